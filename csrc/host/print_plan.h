// FP8_PRINT_PLAN=1: one line on stderr for each distinct problem, when it is first met. What the
// lines say is in host/plan_text.h and host/quantize_text.h.
//
// Host logic: no CUDA, tested on any machine.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_set>

#include "fp8/core.h"

namespace fp8::core {

inline const char* granularity_name(Granularity granularity) {
  switch (granularity) {
    case Granularity::kTensorwise:
      return "tensorwise";
    case Granularity::kRowwise:
      return "rowwise";
    case Granularity::kBlock1x128:
      return "1x128";
    case Granularity::kBlock128x128:
      return "128x128";
  }
  return "unknown";
}

// device: the CUDA index, or negative for the CPU.
inline std::string device_text(int device) {
  return device < 0 ? "cpu" : "cuda:" + std::to_string(device);
}

// FP8_PRINT_PLAN=1, read once.
inline bool printing_plans() {
  static const bool on = [] {
    const char* text = std::getenv("FP8_PRINT_PLAN");
    return text != nullptr && std::string_view(text) == "1";
  }();
  return on;
}

// True the first time that a line comes, in any thread.
class FirstTimes {
 public:
  bool operator()(const std::string& line) {
    const std::lock_guard lock(mutex_);
    return seen_.insert(line).second;
  }

 private:
  std::mutex mutex_;
  std::unordered_set<std::string> seen_;
};

// All problems together: a line that was printed is not printed again.
inline void print_first_time(const std::string& line) {
  static FirstTimes first;
  if (first(line)) std::fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace fp8::core
