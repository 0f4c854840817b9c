// fp8._C: what Python wants to know of the native library. Tensors go through torch.ops, never
// through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "fp8/core.h"
#include "fp8/version.h"
#include "host/tuning.h"
#include "torch/matmul/autotune.h"
#include "torch/matmul/batch_invariant.h"
#include "torch/quantize/whole_gpu.h"

namespace py = pybind11;

namespace {

std::map<std::string, std::string> build_info() {
  return {{"version", FP8_VERSION},
          {"cuda", FP8_CUDA_VERSION},
          {"cublaslt", FP8_CUBLASLT_VERSION},
          {"archs", FP8_CUDA_ARCHS},
          {"compiler", FP8_COMPILER}};
}

std::map<std::string, int64_t> plan_cache_info() {
  const fp8::core::PlanCacheInfo info = fp8::core::plan_cache_info();
  return {{"size", info.size},     {"capacity", info.capacity},   {"hits", info.hits},
          {"misses", info.misses}, {"fallbacks", info.fallbacks}, {"tuned", info.tuned}};
}

void plan_cache_clear() { fp8::core::plan_cache_clear(); }

size_t cublaslt_runtime_version() { return fp8::core::cublaslt_runtime_version(); }

// (problem, us of the first choice, us of the chosen one, source)
using TunedProblem = std::tuple<std::string, double, double, std::string>;

bool autotune_enabled() { return fp8::autotune::enabled(); }

void autotune_open() { fp8::autotune::open_scope(); }

std::vector<TunedProblem> autotune_close() {
  std::vector<TunedProblem> problems;
  for (const auto& problem : fp8::autotune::close_scope()) {
    problems.emplace_back(problem.text, problem.first_us, problem.chosen_us, problem.source);
  }
  return problems;
}

std::string autotune_file(const std::string& gpu) {
  return fp8::tuning::file_path(gpu, cublaslt_runtime_version()).string();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and plan-cache statistics of the native fp8 library.";
  m.def("build_info", &build_info,
        "What the library was built with; \"cuda\" is empty without CUDA.");
  m.def("plan_cache_info", &plan_cache_info,
        "Size, capacity, hits, misses, fallbacks and tuned plans of the plan cache.");
  m.def("plan_cache_clear", &plan_cache_clear, "Forgets all matmul plans and resets the counters.");
  m.def("cublaslt_runtime_version", &cublaslt_runtime_version,
        "cublasLtGetVersion() of the library that this process loaded; 0 without CUDA.");
  m.def("autotune_enabled", &autotune_enabled, "Whether problems are tuned when they are met.");
  m.def("autotune_open", &autotune_open, "Tunes every problem that is met until autotune_close.");
  m.def("autotune_close", &autotune_close, py::call_guard<py::gil_scoped_release>(),
        "The problems that were met since: (problem, first us, chosen us, source).");
  m.def("autotune_file", &autotune_file, py::arg("gpu"),
        "The file with what was measured on this model of GPU; empty where no folder is known.");
  m.def("batch_invariant_enabled", &fp8::batch_invariant::enabled,
        "Whether a row's product must not depend on the other rows.");
  m.def("batch_invariant_open", &fp8::batch_invariant::open_scope,
        "It must not until batch_invariant_close; scopes nest.");
  m.def("batch_invariant_close", &fp8::batch_invariant::close_scope, "Closes such a scope.");
  m.def("whole_gpu_launches", &fp8::whole_gpu_launches,
        "Whether a quantization may wait until the whole GPU is free for it.");
  m.def("spare_collectives", &fp8::spare_collectives,
        "No such launches from now on, unless FP8_WHOLE_GPU_LAUNCHES is set.");
}
