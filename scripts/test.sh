#!/usr/bin/env bash
# Runs the tests of an already built tree: `make test` and `make test-gpu` call it.
#   scripts/test.sh all   C++ and Python, everything that this machine can run
#   scripts/test.sh gpu   the tests that need a GPU; fails where there is none. Writes what came of them to
#                         benchmarks/results, or to build/status where PYTEST_ARGS chose among them
# PYTHON is the interpreter, CTEST is ctest, PYTEST_ARGS goes to pytest. The GPU's tests are host work for the most part:
# TEST_JOBS processes (default: a quarter of the cores, at most 8) share them and the GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mode=${1:?all or gpu}
python=${PYTHON:-python3}
ctest=${CTEST:-ctest}
read -ra pytest_args <<<"${PYTEST_ARGS:-}"

gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$mode" = gpu ] && [ "$gpu" = 0 ]; then
  echo "test-gpu: torch sees no CUDA device on this machine, so no GPU test can run" >&2
  exit 1
fi

reports=$PWD/build/test-gpu/reports
record() { # also where a test failed and the script ends
  local status=$?
  "$python" benchmarks/status.py test-gpu --begin "$begin" --status "$status" \
    --arguments="${PYTEST_ARGS:-}" --junit "$reports"/*.xml
  exit "$status"
}
if [ "$mode" = gpu ]; then
  rm -rf "$reports" && mkdir -p "$reports"
  begin=$(date +%s)
  trap record EXIT
fi

run_ctest() { "$ctest" --test-dir build --output-on-failure --no-tests=error -j "$(nproc)" "$@"; }
count_ctest() { "$ctest" --test-dir build -N "$@" | sed -n 's/^Total Tests: //p'; }

cpp_skipped=0
cpp_status=0
cpp_tests=$(count_ctest)
if [ "$cpp_tests" = 0 ]; then
  if [ "$mode" = all ]; then
    echo "test: ctest knows no C++ test in build/ (were they built? see scripts/catch2.sh)" >&2
    exit 1
  fi
  echo "C++ tests left out: no Catch2 header here (set CATCH2_INCLUDE_DIR to its folder)"
elif [ "$mode" = gpu ]; then
  run_ctest -L gpu -j 1 --output-junit "$reports/ctest.xml" || cpp_status=$? # Python's run all the same
elif [ "$gpu" = 1 ]; then
  run_ctest -j 1
else
  cpp_skipped=$(count_ctest -L gpu)
  run_ctest -LE gpu
fi

# pytest last: its closing line ends the output.
if [ "$mode" = all ]; then
  # Without a GPU tests are work of one core for the most part: two processes share them, unless some were chosen.
  two=$([ "$gpu" = 0 ] && [ "$(nproc)" -ge 2 ] && [ ${#pytest_args[@]} -eq 0 ] && echo 1 || echo 0)
  if [ "$two" = 0 ]; then
    exec "$python" -m pytest --cpp-gpu-skipped="$cpp_skipped" ${pytest_args[@]+"${pytest_args[@]}"}
  fi
  log=build/test-second-half.log
  "$python" -m pytest --shard=2/2 -o cache_dir="$PWD/build/test-second-half" &>"$log" &
  second=$!
  trap 'kill "$second" 2>/dev/null' EXIT
  status=0
  "$python" -m pytest --shard=1/2 --cpp-gpu-skipped="$cpp_skipped" || status=$?
  wait "$second" || status=$?
  trap - EXIT
  printf '\nthe second half of the tests, which ran at the same time:\n\n'
  cat "$log"
  exit "$status"
fi
jobs=${TEST_JOBS:-$(($(nproc) / 4 > 8 ? 8 : $(nproc) / 4))}
jobs=$((jobs < 1 ? 1 : jobs > 16 ? 16 : jobs))
pids=()
for ((i = 1; i <= jobs; ++i)); do
  # A folder each for what autotune keeps: its tests remove it.
  FP8_CACHE_DIR=$PWD/build/test-gpu/cache-$i "$python" -m pytest -m gpu --require-gpu --shard="$i/$jobs" --durations=8 \
    -o cache_dir="$PWD/build/test-gpu/pytest-$i" --junitxml="$reports/pytest-$i.xml" ${pytest_args[@]+"${pytest_args[@]}"} &>"build/test-gpu-$i.log" &
  pids+=($!)
done
status=$cpp_status
for ((i = 1; i <= jobs; ++i)); do
  wait "${pids[i - 1]}" || status=1
  cat "build/test-gpu-$i.log"
done
tail -qn 1 build/test-gpu-[1-"$jobs"].log | sed 's/^/test-gpu: /'
exit $status
