#!/usr/bin/env bash
# Runs the tests of an already built tree: `make test` and `make test-gpu` call it.
#   scripts/test.sh all   C++ and Python, everything that this machine can run
#   scripts/test.sh gpu   the tests that need a GPU; fails where there is none. Writes what came of them to
#                         benchmarks/results, or to build/status where PYTEST_ARGS chose among them
# PYTHON is the interpreter, CTEST is ctest, PYTEST_ARGS goes to pytest. TEST_JOBS processes share the tests (default: at
# most 2, as each test of a CPU may use all cores; of the GPU's, which are host work for the most part, three quarters of
# the cores, at most 16).
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

# pytest last: its closing line ends the output. A few chosen tests are not worth the start of processes.
cores=$(env -u OMP_NUM_THREADS nproc)
if [ "$mode" = all ]; then
  jobs=$([ "$gpu" = 0 ] && [ ${#pytest_args[@]} -eq 0 ] && echo $((cores < 2 ? cores : 2)) || echo 0)
  mode_args=(--cpp-gpu-skipped="$cpp_skipped")
else
  jobs=$((cores * 3 / 4 > 16 ? 16 : cores * 3 / 4))
  mode_args=(-m gpu --require-gpu --durations=12 --junitxml="$reports/pytest.xml")
fi
jobs=${TEST_JOBS:-$jobs}
# Threads of all processes together as many as cores: more would wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((jobs > 1 && cores > jobs ? cores / jobs : jobs > 1 ? 1 : cores))}
"$python" -m pytest -n "$jobs" --dist loadgroup "${mode_args[@]}" ${pytest_args[@]+"${pytest_args[@]}"} ||
  exit $?
exit "$cpp_status"
