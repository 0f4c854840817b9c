// Second launch of a delayed quantization: was the guess of the cast pass right for this x?
//
// Every block adds up what the cast pass left of each tile, 8 bytes for 8192 elements, and comes to
// the same answer by the rule in fp8/core.h (history.cuh). The first block moves the history on. As
// a rule the guess was right, and the launch is over: two to three microseconds, of which the start
// overlaps the cast pass. Else the blocks cast x again, a tile after the other.
#pragma once

#include "core/device/dispatch.cuh"
#include "core/quantize/kernels.h"
#include "core/quantize/tile.cuh"

namespace fp8::core {

// amax and fingerprint of all tiles, in every thread. scratch: two words a warp.
__device__ __forceinline__ uint2 whole_report(const uint2* tiles, int64_t count,
                                              uint32_t* scratch) {
  constexpr int kBatch = 4;
  uint2 all{0, 0};
  for (int64_t begin = threadIdx.x; begin < count; begin += kBatch * kThreads) {
    uint2 batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t tile = begin + i * kThreads;
      batch[i] = tile < count ? __ldcg(tiles + tile) : uint2{0, 0};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) all = {max(all.x, batch[i].x), all.y + batch[i].y};
  }
  all.y = warp_add(all.y);
  if (threadIdx.x % 32 == 0) scratch[kWarps + threadIdx.x / 32] = all.y;
  all.x = block_max<kWarps>(all.x, scratch);  // with the barrier for both
  all.y = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) all.y += scratch[kWarps + i];
  all.y = fingerprint_of(all.y);
  return all;
}

// settled_amax in every thread, by one warp. scratch: whole_report's, of which `own` is.
template <typename Format>
__device__ __forceinline__ SettledAmax settled_in_block(const uint32_t* history, const uint2& own,
                                                        uint32_t* scratch) {
  __syncthreads();  // its readers are done
  if (threadIdx.x < 32) {
    const SettledAmax settled = settled_amax<Format>(history, own);
    if (threadIdx.x == 0) {
      scratch[0] = settled.used;
      scratch[1] = static_cast<uint32_t>(settled.repeats);
    }
  }
  __syncthreads();
  return {scratch[0], scratch[1] != 0};
}

// Whether a tile of this block was cast with another amax than `used`. Each thread looks at some.
__device__ __forceinline__ bool cast_otherwise(const uint32_t* tile_guess, int64_t tiles,
                                               uint32_t used) {
  bool other = false;
  for (int64_t i = threadIdx.x; blockIdx.x + i * gridDim.x < tiles; i += kThreads) {
    other |= __ldcg(tile_guess + blockIdx.x + i * gridDim.x) != used;
  }
  return __syncthreads_or(other) != 0;
}

template <typename Source, typename Format, bool kData, bool kDataT>
__global__ void __launch_bounds__(kThreads, 2)
    settle_delayed_kernel(const From<Source, CastParams> from) {
  using T = typename Source::Element;
  const CastParams& p = from.to;
  let_next_start();
  __shared__ alignas(16) uint32_t transposed[kDataT ? kTransposedWords : 1];
  __shared__ uint32_t scratch[2 * kWarps];
  wait_for_previous();

  const int64_t tiles = p.plan.col_tiles * p.plan.row_tiles;
  const uint2 own = whole_report(p.tile_report, tiles, scratch);
  const SettledAmax settled = settled_in_block<Format>(p.history_before, own, scratch);
  const GroupScale scale = scale_from_amax(settled.used, Format::kMax, p.power_of_two);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (p.scale != nullptr) *p.scale = scale.scale;
    if (p.amax_out != nullptr) *p.amax_out = __uint_as_float(settled.used);
    if (!settled.repeats) {
      const uint32_t count = __ldcg(p.history_before + kHistoryCount);
      leave_record(p.history, count, own.x, settled.used, own.y);
    }
    p.history[kHistoryGuess] = settled.repeats ? settled.used : 0;
  }
  if (!cast_otherwise(p.tile_guess, tiles, settled.used)) return;

  const float multiplier = scale.quant_multiplier;
  const int group = static_cast<int>(threadIdx.x) / kColGroups;
  const int col_group = static_cast<int>(threadIdx.x) % kColGroups;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t tile_row = tile / p.plan.col_tiles * kTileRows;
    const int64_t col0 = tile % p.plan.col_tiles * kTileCols;
    const int64_t row0 = tile_row + group * kRowsPerThread;
    const int64_t col = col0 + col_group * 8;
    const int valid_cols = of_eight(p.cols - col);
    Vec8<T> v[kRowsPerThread];
    load_tile(from.source, row0, p.rows - row0, col, valid_cols, v);
    uint2 codes[kRowsPerThread];
    uint8_t* out = static_cast<uint8_t*>(p.data.data) + row0 * p.data.ld + col;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      infinite_to_nan(v[r]);
      codes[r] = keep_first(encode8<Format>(v[r], [&](int) { return multiplier; }),
                            row0 + r < p.rows ? valid_cols : 0);
      if constexpr (kData) {
        if (row0 + r < p.data.rows && col < p.data.ld) *reinterpret_cast<uint2*>(out) = codes[r];
        out += p.data.ld;
      }
    }
    if constexpr (kDataT) {
      __syncthreads();  // the tile before has left
      store_transposed_tile(p.data_t, p.data_t.ld, tile_row, col0, codes, transposed);
    }
  }
}

// The launch after a cast of a source.
template <typename Format, typename Source>
void launch_settle_of(const Source& source, const CastParams& params, unsigned blocks,
                      cudaStream_t stream) {
  const bool data = params.data.data != nullptr;
  const bool data_t = params.data_t.data != nullptr;
  const From<Source, CastParams> from{source, params};
  const auto go = [&](auto kernel) {
    launch(kernel, blocks, kThreads, stream, from, {.pdl = params.pdl});
  };
  if (data && data_t) {
    go(settle_delayed_kernel<Source, Format, true, true>);
  } else if (data_t) {
    go(settle_delayed_kernel<Source, Format, false, true>);
  } else {
    go(settle_delayed_kernel<Source, Format, true, false>);
  }
}

}  // namespace fp8::core
