#!/usr/bin/env bash
# compute-sanitizer over every op at small shapes: `make sanitize`. Needs a GPU.
# memcheck takes every tensor as an allocation of its own, so that an access past its end is seen. racecheck looks at
# shared memory: the public quantize ops, and, where the C++ tests are built, what a backward asks of them (column sums,
# a transposed weight) and the passes around grouped products. Those run without torch because racecheck itself dies of
# the grouped matmul of ATen between them ("The Sanitizer failed to handle a hardware exception"), with or without a
# kernel of ours in the process.
# Every step runs, whatever came of those before; what came of them goes to benchmarks/results (benchmarks/status.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
command -v compute-sanitizer >/dev/null || {
  echo "sanitize: compute-sanitizer (CUDA Toolkit) is not on the PATH" >&2
  exit 1
}
logs=build/sanitize
rm -rf "$logs" && mkdir -p "$logs"
begin=$(date +%s)
steps=()
failed=0
step() { # step NAME COMMAND...: compute-sanitizer's tool is the name's first word
  local name=$1 status=0
  shift
  echo "== $name"
  compute-sanitizer --tool "${name%% *}" --error-exitcode 9 \
    --kernel-name "kernel_substring=fp8" "$@" 2>&1 | tee "$logs/${name// /-}.log" || status=$? # not cuBLAS's and ATen's
  steps+=("$name=$status=$logs/${name// /-}.log")
  [ "$status" = 0 ] || failed=1
}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
step "memcheck" "$python" tests/sanitize/op_sweep.py
step "memcheck grouped" "$python" tests/sanitize/op_sweep.py --grouped
step "memcheck layers" "$python" tests/sanitize/op_sweep.py --layers
unset PYTORCH_NO_CUDA_MEMORY_CACHING
step "racecheck" "$python" tests/sanitize/op_sweep.py --no-matmul
core=build/tests/cpp/test_core_gpu
if [ -x "$core" ]; then
  torch=$("$python" -c 'import torch; print(torch.__path__[0])')
  LD_LIBRARY_PATH=python/fp8/lib:$torch/lib:$torch/../nvidia/cu13/lib \
    step "racecheck passes" "$core" '[quantize],[grouped],[norm],[mlp]'
else
  echo "racecheck of column sums and grouped passes left out: the C++ tests are not built (no Catch2 header)"
fi
"$python" benchmarks/status.py sanitize --begin "$begin" --status "$failed" --log "${steps[@]}"
exit "$failed"
