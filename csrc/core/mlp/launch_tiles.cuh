// Launches passes of an MLP's backward whose blocks take a few tiles each, with their inputs in
// shared memory.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>

#include "core/device/device.h"
#include "core/device/dispatch.cuh"
#include "core/device/shared_memory.h"
#include "host/launch.h"

namespace fp8::core {

// A few tiles to a block: some multiprocessors are faster than others, and take more blocks then.
constexpr int64_t kTilesOfBlock = 6;

// What such a kernel declares of shared memory, at most: tiles that turn, and scales.
constexpr int kStaticTileBytes = 28 * 1024;

// Launches a kernel of such blocks. most_tiles: of a block, as long as the GPU is full.
template <auto kKernel, typename Inputs, typename Params>
void launch_tiles(int64_t tiles, int blocks_per_sm, const DeviceInfo& device, cudaStream_t stream,
                  const Params& params, bool pdl, int64_t most_tiles = kTilesOfBlock) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  shared_memory_of(reinterpret_cast<const void*>(kKernel), known, kStaticTileBytes);
  const int64_t at_a_time = static_cast<int64_t>(device.sm_count) * blocks_per_sm;
  const int64_t each = std::clamp<int64_t>(ceil_div(tiles, at_a_time), 1, most_tiles);
  launch(kKernel, static_cast<unsigned>(ceil_div(tiles, each)), kThreads, stream, params,
         {.pdl = pdl, .shared_bytes = Inputs::kBytes});
}

}  // namespace fp8::core
