# Finds the LibTorch of a pip-installed torch, through the Python interpreter, and makes the targets
#   LibTorch::cpu   libtorch_cpu, libc10 and their headers
#   LibTorch::cuda  the CUDA half, where this torch has one
# Sets LibTorch_VERSION and LibTorch_CUDA_VERSION ("" for a CPU-only torch).
#
# torch's own TorchConfig.cmake is not used: it fails without nvcc, where the CPU part is still wanted, and it puts the
# build machine's paths into every RPATH.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import torch; print(torch.__path__[0], torch.__version__, torch.version.cuda or '', int(torch._C._GLIBCXX_USE_CXX11_ABI), sep=';')"
  OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_VARIABLE _torch_error
  RESULT_VARIABLE _torch_result)
if(NOT _torch_result EQUAL 0)
  message(FATAL_ERROR "fp8: ${Python_EXECUTABLE} cannot import torch. Install it: pip install torch==2.11.0\n${_torch_error}")
endif()
list(GET _torch 0 LibTorch_ROOT)
list(GET _torch 1 LibTorch_VERSION)
list(GET _torch 2 LibTorch_CUDA_VERSION)
list(GET _torch 3 _torch_cxx11_abi)
if(NOT LibTorch_VERSION MATCHES "^2\\.11\\.")
  message(FATAL_ERROR "fp8: built for torch 2.11, found ${LibTorch_VERSION} in ${LibTorch_ROOT}")
endif()

add_library(LibTorch::cpu INTERFACE IMPORTED)
target_include_directories(LibTorch::cpu SYSTEM INTERFACE
  ${LibTorch_ROOT}/include ${LibTorch_ROOT}/include/torch/csrc/api/include)
target_compile_definitions(LibTorch::cpu INTERFACE _GLIBCXX_USE_CXX11_ABI=${_torch_cxx11_abi})
target_link_libraries(LibTorch::cpu INTERFACE ${LibTorch_ROOT}/lib/libtorch_cpu.so ${LibTorch_ROOT}/lib/libc10.so)

if(EXISTS ${LibTorch_ROOT}/lib/libc10_cuda.so)
  add_library(LibTorch::cuda INTERFACE IMPORTED)
  target_link_libraries(LibTorch::cuda INTERFACE LibTorch::cpu ${LibTorch_ROOT}/lib/libc10_cuda.so)
endif()
message(STATUS "fp8: LibTorch ${LibTorch_VERSION} in ${LibTorch_ROOT}")
