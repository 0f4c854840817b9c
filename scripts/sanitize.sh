#!/usr/bin/env bash
# compute-sanitizer over every op at small shapes: `make sanitize`. Needs a GPU.
# memcheck takes every tensor as an allocation of its own, so that an access past its end is seen. racecheck looks at
# shared memory, which only the quantize kernels use among ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
command -v compute-sanitizer >/dev/null || {
  echo "sanitize: compute-sanitizer (CUDA Toolkit) is not on the PATH" >&2
  exit 1
}
ours=(--error-exitcode 9 --kernel-name "kernel_substring=fp8")  # not cuBLAS's and ATen's
echo "== memcheck"
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck "${ours[@]}" \
  "$python" tests/sanitize/op_sweep.py
echo "== racecheck"
compute-sanitizer --tool racecheck "${ours[@]}" "$python" tests/sanitize/op_sweep.py --no-matmul
