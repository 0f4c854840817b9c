// The clock of autotune (torch/matmul/autotune.cpp, which says why candidates are measured so).
#include <chrono>

#include "core/device/check.h"
#include "fp8/core_device.h"
#include "host/tuning.h"

namespace fp8::core {
namespace {

// Times what is launched between start and stop.
class Stopwatch {
 public:
  Stopwatch() {
    FP8_CUDA_CHECK(cudaEventCreate(&start_));
    FP8_CUDA_CHECK(cudaEventCreate(&stop_));
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }
  void start(cudaStream_t stream) { FP8_CUDA_CHECK(cudaEventRecord(start_, stream)); }
  void stop(cudaStream_t stream) { FP8_CUDA_CHECK(cudaEventRecord(stop_, stream)); }
  double microseconds() const {  // waits for stop
    float milliseconds = 0;
    FP8_CUDA_CHECK(cudaEventSynchronize(stop_));
    FP8_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return 1000.0 * milliseconds;
  }

 private:
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
};

// Training runs at the clocks of a GPU that has worked for a while. From rest it runs faster, and
// what is fastest then need not be later. Less will do where another problem was measured just now.
void warm_up(const MatmulPlan& plan, const MatmulArgs& args, void* workspace, cudaStream_t stream) {
  using Clock = std::chrono::steady_clock;
  static Clock::time_point last_end{};  // autotune measures under a lock
  const Clock::time_point start = Clock::now();
  const std::chrono::milliseconds work{start - last_end < std::chrono::seconds(1) ? 50 : 250};
  while (Clock::now() - start < work) {
    for (int i = 0; i < 16; ++i) run_matmul(plan, args, workspace, stream);
    FP8_CUDA_CHECK(cudaStreamSynchronize(stream));
  }
  last_end = Clock::now();
}

}  // namespace

std::vector<TimedMatmul> time_matmuls(const std::vector<MatmulPlan>& candidates,
                                      const MatmulArgs& args, void* workspace, int rounds,
                                      const std::function<void()>& flush, Stream stream) {
  // Once each untimed: the first launch loads the kernel, and may refuse what the heuristic
  // offered.
  std::vector<TimedMatmul> timed;
  for (const MatmulPlan& plan : candidates) {
    try {
      run_matmul(plan, args, workspace, stream);
      timed.push_back({plan});
    } catch (const Error&) {
      cudaGetLastError();  // so that no later check finds it
    }
  }
  if (timed.empty()) return timed;

  warm_up(timed.front().plan, args, workspace, stream);
  std::vector<Stopwatch> watches(rounds * timed.size());
  for (size_t i = 0; i < watches.size(); ++i) {
    flush();
    watches[i].start(stream);
    run_matmul(timed[i % timed.size()].plan, args, workspace, stream);
    watches[i].stop(stream);
  }
  for (size_t candidate = 0; candidate < timed.size(); ++candidate) {
    std::vector<double> times;
    for (size_t i = candidate; i < watches.size(); i += timed.size()) {
      times.push_back(watches[i].microseconds());
    }
    timed[candidate].us = tuning::median(times);
  }
  return timed;
}

}  // namespace fp8::core
