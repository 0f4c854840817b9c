// What the torch layer asks of CUDA itself, so that it needs neither CUDA's headers nor its
// libraries. Not installed.
#pragma once

#include <functional>

#include "fp8/core.h"

namespace fp8::core {

// Whether this is the library with kernels. The other one (core/device/without_cuda.cpp) stands in
// its place where there is no CUDA; what launches there throws.
bool has_cuda();

int compute_capability(int device);  // 90 for 9.0
std::string current_device_name();   // "NVIDIA H200"
size_t l2_bytes();                   // of the current device

// Identifies the CUDA graph capture that the stream is in; 0 when it is in none.
uint64_t capture_id(Stream stream);

struct TimedMatmul {
  MatmulPlan plan;
  double us = 0;  // median
};

// Times the candidates against each other, `rounds` times each after a warm-up, and leaves out
// those that do not run. `flush` is launched before each of them. Waits for the stream.
std::vector<TimedMatmul> time_matmuls(const std::vector<MatmulPlan>& candidates,
                                      const MatmulArgs& args, void* workspace, int rounds,
                                      const std::function<void()>& flush, Stream stream);

}  // namespace fp8::core
