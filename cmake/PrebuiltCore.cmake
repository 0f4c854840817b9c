# The target fp8_core from a package that has been built (FP8_CORE) instead of from its sources: its library, and
# its version.h, which must be of these sources' version. FP8_PYTHON_PACKAGE_DIR is the same package, as a rule.
set(_core ${FP8_CORE}/lib/libfp8_core.so)
set(_version_header ${FP8_CORE}/include/fp8/version.h)
foreach(_file ${_core} ${_version_header})
  if(NOT EXISTS ${_file})
    message(FATAL_ERROR "fp8: FP8_CORE must be the folder of a built fp8 package, but there is no ${_file}")
  endif()
endforeach()
file(STRINGS ${_version_header} _line REGEX "^#define FP8_VERSION ")
if(NOT _line MATCHES "\"${PROJECT_VERSION}\"")
  message(FATAL_ERROR "fp8: these sources are of fp8 ${PROJECT_VERSION}, but ${_version_header} says: ${_line}")
endif()
add_library(fp8_core SHARED IMPORTED)
set_target_properties(fp8_core PROPERTIES
  IMPORTED_LOCATION ${_core} IMPORTED_SONAME libfp8_core.so
  INTERFACE_INCLUDE_DIRECTORIES ${FP8_CORE}/include)  # after csrc/include, for version.h alone
