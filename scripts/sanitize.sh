#!/usr/bin/env bash
# compute-sanitizer over every op at small shapes: `make sanitize`. Needs a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
command -v compute-sanitizer >/dev/null || { echo "sanitize: compute-sanitizer (CUDA Toolkit) is not on the PATH" >&2; exit 1; }
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
  echo "== $tool"
  # Only our kernels: their names live in fp8::core. cuBLAS and ATen are not what is under test.
  compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=fp8 \
    "$python" tests/sanitize/op_sweep.py
done
