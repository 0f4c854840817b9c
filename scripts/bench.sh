#!/usr/bin/env bash
# Every benchmark, one after the other, each in its own process; a failing one does not stop the
# others. At the end the wall time of each. Exit status 2 without a GPU, 1 when one failed.
#   scripts/bench.sh [ARGUMENT...]    passed on to each, such as --quick or --output FOLDER
# PYTHON: the interpreter (default python3).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

benchmarks=(model block moe linear decode generate experts accumulate breakdown quantize matmul grouped host sizes fsdp)
python=${PYTHON:-python3}
failed=()
times=()
for name in "${benchmarks[@]}"; do
  printf '\n== %s\n' "$name"
  SECONDS=0
  "$python" "benchmarks/bench_$name.py" "$@"
  status=$?
  [ "$status" -eq 2 ] && exit 2 # no GPU, or an argument that is wrong
  [ "$status" -ne 0 ] && failed+=("$name")
  times+=("$name $SECONDS")
done

printf '\nwall time, start of Python included:\n'
printf '%s\n' "${times[@]}" | awk '{ printf "  %-10s %4d s\n", $1, $2; sum += $2 }
  END { printf "  %-10s %4d s\n", "all", sum }'
if [ ${#failed[@]} -gt 0 ]; then
  echo "bench: failed: ${failed[*]}" >&2
  exit 1
fi
