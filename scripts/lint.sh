#!/usr/bin/env bash
# Format, style, types, layering and clang-tidy of the whole tree. `make lint`, CI and the pre-commit hook all
# run this script. Every check runs; the exit status says whether one failed.
#   scripts/lint.sh          check
#   scripts/lint.sh --fix    format what the formatters can format, then check
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -d .venv/bin ] && PATH="$PWD/.venv/bin:$PATH"

failures=0
check() { # check TITLE COMMAND...
  local title=$1
  shift
  if "$@"; then
    echo "ok      $title"
  else
    echo "FAILED  $title" >&2
    failures=$((failures + 1))
  fi
}

for tool in clang-format clang-tidy ruff mypy; do
  if ! command -v "$tool" >/dev/null; then
    echo "lint: $tool is missing. Run \`make lint\`, which installs requirements-lint.txt." >&2
    exit 2
  fi
done

# Tracked and new files alike, without those deleted but not yet committed.
mapfile -t files < <(git ls-files --cached --others --exclude-standard | sort -u |
  while read -r file; do [ -f "$file" ] && echo "$file"; done)
cpp=()
text=()
long=()
for file in "${files[@]}"; do
  case $file in
    csrc/*.h | csrc/*.cpp | csrc/*.cu | csrc/*.cuh | \
      tests/cpp/*.h | tests/cpp/*.cpp | tests/cpp/*.cu | tests/cpp/*.cuh | \
      examples/*.cpp | examples/*.h | benchmarks/*.cpp | benchmarks/*.cu) cpp+=("$file") ;;
  esac
  case $file in
    *.png | *.svg | *.json | *.csv) ;;
    *) text+=("$file") ;;
  esac
  case $file in
    *.h | *.cpp | *.cu | *.cuh | *.py)
      lines=$(wc -l <"$file")
      [ "$lines" -gt 400 ] && long+=("$file: $lines lines") ;;
  esac
done

ends_in_newline() {
  local file bad=0
  for file in "${text[@]}"; do
    if [ -s "$file" ] && [ -n "$(tail -c 1 "$file")" ]; then
      echo "$file: no newline at the end" >&2
      bad=1
    fi
  done
  return $bad
}

clang_format() { # one line per file: clang-format itself prints three per place
  local report
  report=$(clang-format --dry-run -Werror --ferror-limit=0 "${cpp[@]}" 2>&1) && return 0
  grep -E '^[^ ]+:[0-9]+:[0-9]+: error' <<<"$report" | cut -d: -f1 | sort | uniq -c >&2
  return 1
}

if [ "${1:-}" = --fix ]; then
  [ ${#cpp[@]} -gt 0 ] && clang-format -i "${cpp[@]}"
  ruff check --quiet --fix .
  ruff format --quiet .
fi

if [ ${#cpp[@]} -gt 0 ]; then
  check "clang-format" clang_format
fi
check "clang-tidy on torch-free host code" scripts/tidy.sh
check "ruff check" ruff check --quiet --output-format concise .
check "ruff format" ruff format --check .
[ -d python/fp8 ] && check "mypy --strict" mypy --no-error-summary
check "fp8_core includes no torch header, includes lead downwards" python3 scripts/check_layers.py
check "files end in a newline" ends_in_newline
for line in ${long[@]+"${long[@]}"}; do
  echo "warning $line: look for a second concept"
done

if [ "$failures" -gt 0 ]; then
  echo "lint: $failures checks failed (\`scripts/lint.sh --fix\` formats)" >&2
  exit 1
fi
echo "lint: all checks passed"
