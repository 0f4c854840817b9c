// Second pass over x: cast to FP8, row-major, transposed, or both.
//
// A block casts tiles of x (tile.cuh), a few one below the other. Strips are taken from the side
// where the first pass ended: part of x is still in L2 there. The grid may start while the first
// pass drains: its first loads do not depend on it. Bound by bandwidth: 2 + 1 + 1 bytes an element.
#pragma once

#include "core/device/dispatch.cuh"
#include "core/quantize/kernels.h"
#include "core/quantize/tile.cuh"

namespace fp8::core {

// Sums of columns [col0, col0 + 64) over the row chunks, in a fixed order.
__device__ __forceinline__ void finish_column_sums(const CastParams& p, int64_t col0,
                                                   float* partial) {
  const int column = threadIdx.x % kTileCols;
  const int64_t col = col0 + column;
  float sum = 0.0F;
  if (col < p.cols) {
    const int part0 = static_cast<int>(threadIdx.x) / kTileCols;
    const float* source = p.col_sum + part0 * p.cols + col;
    for (int part = part0; part < p.col_parts; part += kThreads / kTileCols) {
      sum += __ldcg(source);
      source += kThreads / kTileCols * p.cols;
    }
  }
  __syncthreads();
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < kTileCols && col < p.cols) {
#pragma unroll
    for (int i = 1; i < kThreads / kTileCols; ++i) sum += partial[i * kTileCols + column];
    store_sum(p.column_sum, p.column_sum_dtype, col, sum);
  }
}

// Where a tile's scale comes from.
enum class ScaleOf { kTensorwise, kDelayed, kRowwise };

// Blocks to a multiprocessor: enough loads in flight to saturate memory, few enough that no
// register spills (fp16 needs some for its conversion). Unless the source says how many.
template <typename Source, ScaleOf kScaleOf>
constexpr int cast_blocks() {
  using T = typename Source::Element;
  if constexpr (requires { Source::kMinBlocks; }) return Source::kMinBlocks;
  if (sizeof(T) == 4) return kScaleOf == ScaleOf::kDelayed ? 2 : 3;
  if (kScaleOf != ScaleOf::kRowwise) return 5;
  return std::is_same_v<T, __half> ? 3 : 4;
}

// amax of the tile's row that this thread looks after; the first 128 threads have one.
__device__ __forceinline__ uint32_t row_amax_bits(const CastParams& p, int64_t tile) {
  const int64_t row = tile * kTileRows + threadIdx.x;
  if (threadIdx.x >= kTileRows || row >= p.rows) return 0;
  return max_of<8>(p.row_amax + row, p.rows, p.row_parts);
}

// amax of the finite values of a warp's part of a tile, and a fingerprint of it: of the maxima of
// four rows each, which cost nothing more. Inf becomes NaN, which no scale of earlier calls hides.
template <typename T>
__device__ __forceinline__ void examine(Vec8<T> (&v)[kRowsPerThread], uint32_t place,
                                        uint2* warp_report) {
  PackedAmax<T> amax;
  amax.clear();
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) amax.update(v[r]);
  const uint32_t print = warp_add(mix_bits(amax.fold() ^ place * 0x9E3779B1U));
  uint32_t bits = warp_max(amax.max_float_bits());
  if (bits >= kExponentBits) {
    bits = 0;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      bits = max(bits, finite_amax_bits(v[r]));
      infinite_to_nan(v[r]);
    }
    bits = warp_max(bits);
  }
  if (threadIdx.x % 32 == 0) warp_report[threadIdx.x / 32] = make_uint2(bits, print);
}

// The same of the tile, from the first thread; each block has a place of its own.
__device__ __forceinline__ void report(uint2* tile_report, const uint2* warp_report) {
  if (threadIdx.x != 0) return;
  uint2 all = warp_report[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) {
    all.x = max(all.x, warp_report[i].x);
    all.y += warp_report[i].y;
  }
  *tile_report = all;
}

template <typename Source, typename Format, ScaleOf kScaleOf, bool kData, bool kDataT>
__global__ void __launch_bounds__(kThreads, cast_blocks<Source, kScaleOf>())
    cast_kernel(const From<Source, CastParams> from) {
  using T = typename Source::Element;
  const CastParams& p = from.to;
  constexpr bool kRowwise = kScaleOf == ScaleOf::kRowwise;
  constexpr bool kDelayed = kScaleOf == ScaleOf::kDelayed;
  let_next_start();
  __shared__ alignas(16) uint32_t transposed[kDataT ? kTransposedWords : 1];
  __shared__ alignas(16) uint32_t scratch[kThreads];
  __shared__ float row_multiplier[kRowwise && kData ? kTileRows : 1];
  __shared__ float col_multiplier[kRowwise && kDataT ? kTileCols : 1];

  const int group = threadIdx.x / kColGroups;
  const int col_group = threadIdx.x % kColGroups;
  const auto tiles_across = static_cast<unsigned>(p.plan.col_tiles);
  const int64_t tile_col = blockIdx.x % tiles_across;
  int64_t strip = blockIdx.x / tiles_across;
  if constexpr (kDataT && !kRowwise) strip = p.plan.strips - 1 - strip;  // see kernels.h
  const int64_t col0 = tile_col * kTileCols;
  const int64_t col = col0 + col_group * 8;
  // Tensorwise a block casts one tile, and the loop below goes: it would cost registers.
  const int64_t tile_begin = kRowwise ? strip * p.plan.tiles_per_block : strip;
  const int64_t tile_end =
      kRowwise ? min(tile_begin + p.plan.tiles_per_block, p.plan.row_tiles) : tile_begin + 1;

  const int valid_cols = of_eight(p.cols - col);
  const bool writes_cols = col < p.data.ld;
  const auto load = [&](int64_t tile, Vec8<T>(&v)[kRowsPerThread]) {
    const int64_t row = tile * kTileRows + group * kRowsPerThread;
    load_tile(from.source, row, p.rows - row, col, valid_cols, v);
  };
  // The first tile is under way while the partial results are reduced.
  Vec8<T> v[kRowsPerThread];
  load(tile_begin, v);
  wait_for_previous();

  [[maybe_unused]] uint32_t row_bits = 0;
  if constexpr (kRowwise && kData) row_bits = row_amax_bits(p, tile_begin);
  [[maybe_unused]] float tensor = 0.0F;
  [[maybe_unused]] auto* warp_report = reinterpret_cast<uint2*>(scratch);
  if constexpr (kDelayed) {
    __shared__ uint32_t guess;
    const auto tile = static_cast<unsigned>(strip) * tiles_across + static_cast<unsigned>(tile_col);
    if (threadIdx.x < 32) {
      const uint32_t amax = guessed_amax(p.history);
      // Of each tile: where another stream writes the history meanwhile, guesses differ.
      if (threadIdx.x == 0) p.tile_guess[tile] = guess = amax;
    }
    static_assert(kAmaxHistorySize <= kThreads);
    if (blockIdx.x == 0 && threadIdx.x < kAmaxHistorySize) {
      p.history_before[threadIdx.x] = __ldcg(p.history + threadIdx.x);
    }
    examine(v, tile * kThreads + threadIdx.x, warp_report);
    __syncthreads();
    tensor = scale_from_amax(guess, Format::kMax, p.power_of_two).quant_multiplier;
    report(p.tile_report + blockIdx.x, warp_report);
  } else if constexpr (!kRowwise) {
    tensor = tensor_multiplier(p, Format::kMax, scratch);
  }
  if constexpr (kRowwise && kDataT) {
    column_multipliers(p, col0, Format::kMax, tile_begin == 0, scratch, col_multiplier);
  }
  if (p.column_sum != nullptr && tile_begin == 0) {
    finish_column_sums(p, col0, reinterpret_cast<float*>(scratch));
  }

  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t tile_row = tile * kTileRows;
    if constexpr (kRowwise && kData) {
      __syncthreads();  // the previous tile's readers are done
      if (threadIdx.x < kTileRows) {
        const int64_t row = tile_row + threadIdx.x;
        const GroupScale row_group = scale_from_amax(row_bits, Format::kMax, p.power_of_two);
        row_multiplier[threadIdx.x] = row_group.quant_multiplier;
        if (tile_col == 0 && row < p.data.rows) p.scale[row] = row_group.scale;
      }
    }
    if constexpr (kRowwise || kDataT) __syncthreads();

    const int64_t row0 = tile_row + group * kRowsPerThread;
    uint2 codes[kRowsPerThread];
    if constexpr (kData || !kRowwise) {
      uint8_t* out = static_cast<uint8_t*>(p.data.data) + row0 * p.data.ld + col;
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        float multiplier = tensor;
        if constexpr (kRowwise) multiplier = row_multiplier[group * kRowsPerThread + r];
        codes[r] = keep_first(encode8<Format>(v[r], [&](int) { return multiplier; }),
                              row0 + r < p.rows ? valid_cols : 0);
        if constexpr (kData) {
          if (row0 + r < p.data.rows && writes_cols) *reinterpret_cast<uint2*>(out) = codes[r];
          out += p.data.ld;
        }
      }
    }
    if constexpr (kRowwise && kDataT) {
      const auto multiplier = [&](int j) { return col_multiplier[col_group * 8 + j]; };
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        codes[r] =
            keep_first(encode8<Format>(v[r], multiplier), row0 + r < p.rows ? valid_cols : 0);
      }
    }
    if constexpr (kRowwise) {
      if (tile + 1 < tile_end) {
        load(tile + 1, v);
        if constexpr (kData) row_bits = row_amax_bits(p, tile + 1);
      }
    }

    if constexpr (kDataT)
      store_transposed_tile(p.data_t, p.data_t.ld, tile_row, col0, codes, transposed);
  }
}

// The pass over a source.
template <typename Format, ScaleOf kScaleOf, typename Source>
void launch_cast_of(const Source& source, const CastParams& params, cudaStream_t stream) {
  const bool data = params.data.data != nullptr;
  const bool data_t = params.data_t.data != nullptr;
  const auto grid = static_cast<unsigned>(params.plan.col_tiles * params.plan.strips);
  const From<Source, CastParams> from{source, params};
  const auto go = [&](auto kernel) {
    launch(kernel, grid, kThreads, stream, from, {.pdl = params.pdl});
  };
  if (data && data_t) {
    go(cast_kernel<Source, Format, kScaleOf, true, true>);
  } else if (data_t) {
    go(cast_kernel<Source, Format, kScaleOf, false, true>);
  } else {
    go(cast_kernel<Source, Format, kScaleOf, true, false>);
  }
}

// Which of these a cast is, from its parameters.
inline ScaleOf scale_of(const CastParams& params, Granularity granularity) {
  if (granularity == Granularity::kRowwise) return ScaleOf::kRowwise;
  const bool delayed = params.static_scale == nullptr && params.tensor_amax == nullptr;
  return delayed ? ScaleOf::kDelayed : ScaleOf::kTensorwise;
}

}  // namespace fp8::core
