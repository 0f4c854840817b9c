#!/usr/bin/env bash
# clang-tidy (.clang-tidy) on the host code that includes no torch header: the host logic's headers and the .cpp files
# of fp8_core. Part of `make lint`; a run over unchanged files is skipped.
#   scripts/tidy.sh all   the files with torch too, from build/compile_commands.json: minutes (make tidy)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cuda=${CUDA_HOME:-/usr/local/cuda}/include
jobs=$(nproc)

if [ "${1:-}" = all ]; then
  [ -f build/compile_commands.json ] || { echo "tidy: no build/compile_commands.json, run \`make build\`" >&2; exit 1; }
  find csrc -name '*.cpp' -print0 | xargs -0 -n 1 -P "$jobs" clang-tidy --quiet -p build 2> >(grep -v 'warnings generated' >&2)
  exit
fi

headers=(csrc/include/fp8/core.h csrc/include/fp8/core_device.h csrc/host/{formats,launch,plan_key,plan_cache,plan_text}.h)
sources=()
if [ -f "$cuda/cublasLt.h" ]; then
  sources=(csrc/core/matmul/lt_{choice,matmul,timing}.cpp csrc/core/quantize/quantize_core.cpp csrc/core/device/device.cpp)
else
  echo "tidy: fp8_core left out, no CUDA headers in $cuda"
fi

stamp=build/tidy/$(cat .clang-tidy "${headers[@]}" "${sources[@]}" csrc/{host,core/*}/*.h scripts/tidy.sh | sha256sum | cut -c1-16)
[ -f "$stamp" ] && exit 0
rm -rf build/tidy && mkdir -p build/tidy
printf '#include "%s"\n' "${headers[@]#csrc/}" | sed 's#include/fp8/#fp8/#' >build/tidy/headers.cpp
printf '%s\0' build/tidy/headers.cpp ${sources[@]+"${sources[@]}"} |
  xargs -0 -I FILE -P "$jobs" clang-tidy --quiet --config-file=.clang-tidy FILE -- -std=c++20 -ffp-contract=off \
    -Icsrc -Icsrc/include -isystem "$cuda" -DFP8_OLDEST_CUDA_ARCH=90 2> >(grep -v 'warnings generated' >&2)
touch "$stamp"
