#include "torch/quantize/whole_gpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace fp8 {
namespace {

// nullptr where unset or empty
const char* wish() {
  const char* text = std::getenv("FP8_WHOLE_GPU_LAUNCHES");
  return text != nullptr && *text != '\0' ? text : nullptr;
}

std::atomic<bool>& state() {
  static std::atomic<bool> on = [] {
    if (const char* text = wish()) return std::strcmp(text, "0") != 0;
    const char* processes = std::getenv("WORLD_SIZE");
    return processes == nullptr || std::strtol(processes, nullptr, 10) <= 1;
  }();
  return on;
}

}  // namespace

bool whole_gpu_launches() { return state().load(std::memory_order_relaxed); }

void spare_collectives() {
  if (wish() == nullptr) state().store(false, std::memory_order_relaxed);
}

}  // namespace fp8
