# Written by CMake as _build.py, next to this file: what the native library was built for.
VERSION: str  # of fp8, "0.1.0"
TORCH_VERSION: str  # "2.11.0+cu130"
CUDA_VERSION: str  # "13.0"; empty when built without CUDA
