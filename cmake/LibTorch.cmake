# Targets for the LibTorch in LibTorch_ROOT: pip's torch package, or an unpacked LibTorch. The build and the installed
# FP8Config.cmake both include this file.
#   LibTorch::cpu    libtorch_cpu, libc10 and their headers
#   LibTorch::cuda   exists where this LibTorch has a CUDA half, and is that
#   LibTorch::program  what a program links: these, and by name, whether it refers to them or not, libtorch (which
#                    AOTInductor's models ask for), libtorch_cuda (else LibTorch has no CUDA there) and the CUDA libraries
#                    of libfp8_*, which those do not find by themselves where fp8 is not installed beside torch
# Sets LibTorch_VERSION (2.11.0+cu130), LibTorch_CUDA_VERSION ("" for one without CUDA), LibTorch_LIBRARY_PATH (folders
# that a linker needs to see), and LibTorch_ERROR where something is wrong.
#
# torch's own TorchConfig.cmake is not used: it fails without nvcc, where the CPU part is still wanted, and it puts the
# build machine's paths into every RPATH.
set(LibTorch_ERROR "")
set(LibTorch_VERSION "")
set(LibTorch_CUDA_VERSION "")
if(EXISTS ${LibTorch_ROOT}/version.py)  # pip
  file(READ ${LibTorch_ROOT}/version.py _torch_facts)
  if(_torch_facts MATCHES "__version__ = '([^']*)'")
    set(LibTorch_VERSION ${CMAKE_MATCH_1})
  endif()
  if(_torch_facts MATCHES "\ncuda: [^=]*= '([^']*)'")
    set(LibTorch_CUDA_VERSION ${CMAKE_MATCH_1})
  endif()
elseif(EXISTS ${LibTorch_ROOT}/build-version)
  file(STRINGS ${LibTorch_ROOT}/build-version LibTorch_VERSION LIMIT_COUNT 1)
  if(LibTorch_VERSION MATCHES "\\+cu([0-9]+)([0-9])$")
    set(LibTorch_CUDA_VERSION ${CMAKE_MATCH_1}.${CMAKE_MATCH_2})
  endif()
endif()
if(NOT LibTorch_VERSION)
  set(LibTorch_ERROR "there is no LibTorch in ${LibTorch_ROOT}")
elseif(LibTorch_VERSION VERSION_LESS 2.11)
  set(LibTorch_ERROR "fp8 needs torch 2.11 or newer, but ${LibTorch_VERSION} is in ${LibTorch_ROOT}")
endif()

set(LibTorch_LIBRARY_PATH ${LibTorch_ROOT}/lib)
if(EXISTS ${LibTorch_ROOT}/../nvidia/cu13/lib)
  list(APPEND LibTorch_LIBRARY_PATH ${LibTorch_ROOT}/../nvidia/cu13/lib)
endif()

if(NOT LibTorch_ERROR AND NOT TARGET LibTorch::cpu)
  add_library(LibTorch::cpu INTERFACE IMPORTED)
  target_include_directories(LibTorch::cpu SYSTEM INTERFACE
    ${LibTorch_ROOT}/include ${LibTorch_ROOT}/include/torch/csrc/api/include)
  target_compile_definitions(LibTorch::cpu INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
  target_link_libraries(LibTorch::cpu INTERFACE ${LibTorch_ROOT}/lib/libtorch_cpu.so ${LibTorch_ROOT}/lib/libc10.so)

  set(_torch_by_name ${LibTorch_ROOT}/lib/libtorch.so)
  if(EXISTS ${LibTorch_ROOT}/lib/libc10_cuda.so)
    add_library(LibTorch::cuda INTERFACE IMPORTED)
    target_link_libraries(LibTorch::cuda INTERFACE LibTorch::cpu ${LibTorch_ROOT}/lib/libc10_cuda.so)
    list(APPEND _torch_by_name ${LibTorch_ROOT}/lib/libtorch_cuda.so ${LibTorch_ROOT}/lib/libc10_cuda.so)
    foreach(_folder ${LibTorch_LIBRARY_PATH})
      file(GLOB _found ${_folder}/libcudart.so.1[0-9] ${_folder}/libcublasLt.so.1[0-9])
      list(APPEND _torch_by_name ${_found})
    endforeach()
  endif()

  add_library(LibTorch::program INTERFACE IMPORTED)
  list(JOIN LibTorch_LIBRARY_PATH ":" _torch_library_path)
  target_link_options(LibTorch::program INTERFACE -Wl,-rpath-link,${_torch_library_path})
  target_link_libraries(LibTorch::program INTERFACE LibTorch::cpu
    -Wl,--push-state,--no-as-needed ${_torch_by_name} -Wl,--pop-state)
endif()
