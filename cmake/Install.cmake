# What `cmake --install` puts below a prefix, and the wheel into the package: include/fp8, lib, share/cmake/FP8.
# Components: runtime (the libraries), devel (headers and CMake files) and, for a wheel alone, python. The prefix may be
# moved afterwards.
include(CMakePackageConfigHelpers)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" FP8_TORCH_MINOR ${LibTorch_VERSION})
configure_file(cmake/FP8Config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/cmake/FP8Config.cmake @ONLY)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/cmake/FP8ConfigVersion.cmake
  VERSION ${PROJECT_VERSION} COMPATIBILITY SameMinorVersion)

set(_libraries fp8_torch)
if(FP8_WITH_CUDA)
  list(PREPEND _libraries fp8_core)
endif()
install(TARGETS ${_libraries} LIBRARY DESTINATION lib COMPONENT runtime)
# Not core_grouped.h, core_norm.h and core_rope.h: how the passes of layers are cut is no promise.
install(FILES csrc/include/fp8/core.h csrc/include/fp8/ops.h csrc/include/fp8/nn.h
  ${CMAKE_CURRENT_BINARY_DIR}/include/fp8/version.h DESTINATION include/fp8 COMPONENT devel)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/cmake/FP8Config.cmake ${CMAKE_CURRENT_BINARY_DIR}/cmake/FP8ConfigVersion.cmake
  cmake/LibTorch.cmake DESTINATION share/cmake/FP8 COMPONENT devel)
install(TARGETS _C LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
install(FILES ${FP8_PYTHON_PACKAGE_DIR}/_build.py DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
