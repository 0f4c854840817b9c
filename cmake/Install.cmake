# What `cmake --install` puts below a prefix, and the wheel into the package: include/fp8, lib, share/cmake/FP8.
# Components: runtime (the libraries), devel (headers and CMake files) and, for a wheel alone, python and sources (what
# fp8_rebuild.py compiles). The prefix may be moved afterwards.
include(CMakePackageConfigHelpers)
configure_file(cmake/FP8Config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/cmake/FP8Config.cmake @ONLY)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/cmake/FP8ConfigVersion.cmake
  VERSION ${PROJECT_VERSION} COMPATIBILITY SameMinorVersion)

install(TARGETS fp8_core LIBRARY DESTINATION lib COMPONENT runtime)
if(FP8_WITH_CUDA)
  install(TARGETS fp8_core_without_cuda LIBRARY DESTINATION lib/without_cuda COMPONENT runtime)
endif()
install(TARGETS fp8_torch LIBRARY DESTINATION lib/torch${FP8_TORCH_MINOR} COMPONENT runtime)
install(FILES ${FP8_TORCH_LIBRARY_DIR}/build.json DESTINATION lib/torch${FP8_TORCH_MINOR} COMPONENT runtime)
# Not the headers core_*.h: how the passes of layers are cut is no promise.
install(FILES csrc/include/fp8/core.h csrc/include/fp8/ops.h csrc/include/fp8/nn.h
  csrc/include/fp8/nn_blocks.h
  ${CMAKE_CURRENT_BINARY_DIR}/include/fp8/version.h DESTINATION include/fp8 COMPONENT devel)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/cmake/FP8Config.cmake ${CMAKE_CURRENT_BINARY_DIR}/cmake/FP8ConfigVersion.cmake
  cmake/LibTorch.cmake DESTINATION share/cmake/FP8 COMPONENT devel)
install(TARGETS _C LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
install(FILES ${FP8_PYTHON_PACKAGE_DIR}/_build.py DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)

set(_sources share/fp8/sources)
install(FILES CMakeLists.txt VERSION LICENSE DESTINATION ${_sources} COMPONENT sources EXCLUDE_FROM_ALL)
install(FILES scripts/jobs.sh DESTINATION ${_sources}/scripts COMPONENT sources EXCLUDE_FROM_ALL)
install(DIRECTORY cmake DESTINATION ${_sources} COMPONENT sources EXCLUDE_FROM_ALL)
install(DIRECTORY csrc/include csrc/host csrc/cpu csrc/torch csrc/bindings DESTINATION ${_sources}/csrc
  COMPONENT sources EXCLUDE_FROM_ALL)
