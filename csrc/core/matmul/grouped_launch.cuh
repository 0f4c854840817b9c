// From a plan to a compiled kernel.
#pragma once

#include "core/device/dispatch.cuh"
#include "core/device/shared_memory.h"
#include "core/matmul/grouped_kernel.cuh"

namespace fp8::core::grouped {

template <typename C>
void launch_config(const GroupedPlan& plan, const Params& params, cudaStream_t stream) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  const size_t available = shared_memory_of(reinterpret_cast<const void*>(grouped_mm_kernel<C>),
                                            known, /*static_bytes=*/0);
  require(available >= C::kSharedBytes, "grouped_mm needs 227 KiB of shared memory");
  launch(grouped_mm_kernel<C>, static_cast<unsigned>(plan.blocks), kMmThreads, stream, params,
         {.shared_bytes = C::kSharedBytes});
}

// Both warpgroups on a tile of 256 x 128.
template <Accumulation kAccumulation, bool kColumns>
void launch_together(const GroupedPlan& plan, const Params& params, cudaStream_t stream) {
  launch_config<Config<4, 128, false, kAccumulation, kColumns>>(plan, params, stream);
}

}  // namespace fp8::core::grouped
