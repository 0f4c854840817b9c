# Written by CMake as _build.py, next to this file. What each libfp8_torch was built for is beside
# it, in lib/torch*/build.json.
VERSION: str  # of fp8, "0.1.0"
CUDA_VERSION: str  # "13.0"; empty when built without CUDA
