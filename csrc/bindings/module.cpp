// fp8._C: what Python wants to know of the native library. Tensors go through torch.ops, never
// through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "fp8/core.h"
#include "fp8/version.h"

namespace py = pybind11;

namespace {

std::map<std::string, std::string> build_info() {
  return {{"version", FP8_VERSION},   {"torch", FP8_TORCH_VERSION},
          {"cuda", FP8_CUDA_VERSION}, {"cublaslt", FP8_CUBLASLT_VERSION},
          {"archs", FP8_CUDA_ARCHS},  {"compiler", FP8_COMPILER}};
}

std::map<std::string, int64_t> plan_cache_info() {
#ifdef FP8_WITH_CUDA
  const fp8::core::PlanCacheInfo info = fp8::core::plan_cache_info();
#else
  const fp8::core::PlanCacheInfo info;
#endif
  return {{"size", info.size},
          {"capacity", info.capacity},
          {"hits", info.hits},
          {"misses", info.misses},
          {"fallbacks", info.fallbacks}};
}

void plan_cache_clear() {
#ifdef FP8_WITH_CUDA
  fp8::core::plan_cache_clear();
#endif
}

size_t cublaslt_runtime_version() {
#ifdef FP8_WITH_CUDA
  return fp8::core::cublaslt_runtime_version();
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and plan-cache statistics of the native fp8 library.";
  m.def("build_info", &build_info,
        "What the library was built with; \"cuda\" is empty without CUDA.");
  m.def("plan_cache_info", &plan_cache_info,
        "Size, capacity, hits, misses and fallbacks of the plan cache.");
  m.def("plan_cache_clear", &plan_cache_clear, "Forgets all matmul plans and resets the counters.");
  m.def("cublaslt_runtime_version", &cublaslt_runtime_version,
        "cublasLtGetVersion() of the library that this process loaded; 0 without CUDA.");
}
