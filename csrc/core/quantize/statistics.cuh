// First pass over x: maxima of |x| over the tensor, its rows or its columns, and sums of its
// columns.
//
// A block of 8 warps owns rows_per_chunk rows by 1024 columns. A warp takes every eighth row of
// them and reads it with four 16-byte loads a lane (bf16), so each lane keeps its 32 columns to
// itself: column results need no shuffles until the end, when the 8 warps meet in shared memory.
// Bound by bandwidth: 2 bytes an element. Results are partial (one a block and row, column or
// block) and go to fixed places: no zeroing, no atomics, the same bits on every run. The cast pass
// reduces them.
#pragma once

#include <cooperative_groups.h>

#include "core/device/dispatch.cuh"
#include "core/device/reduce.cuh"
#include "core/quantize/kernels.h"
#include "core/quantize/source.cuh"

namespace fp8::core {

namespace cg = cooperative_groups;

constexpr int kVectors = kStatisticsCols / (32 * 8);  // a lane's vectors of a row

enum Statistics : int { kTensorAmax = 1, kRowAmax = 2, kColAmax = 4, kColSum = 8 };

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_sync() { cg::this_cluster().sync(); }
// The same shared variable in another block of the cluster.
template <typename T>
__device__ __forceinline__ const T* in_block(const T* shared, unsigned rank) {
  return cg::this_cluster().map_shared_rank(shared, rank);
}
#else
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ const T* in_block(const T* shared, unsigned) {
  return shared;
}
#endif

// Blocks to a multiprocessor; of the tensor's amax as many as the source says.
template <typename Source, int kWhat>
constexpr int statistics_blocks() {
  if (kWhat != kTensorAmax) return 1;
  if constexpr (requires { Source::kMinBlocks; }) return Source::kMinBlocks;
  return sizeof(typename Source::Element) == 4 ? 4 : 5;
}

template <typename Source, int kWhat>
__global__ void __launch_bounds__(kThreads, statistics_blocks<Source, kWhat>())
    statistics_kernel(const From<Source, StatisticsParams> from) {
  using T = typename Source::Element;
  const StatisticsParams& p = from.to;
  constexpr bool kPerRow = (kWhat & kRowAmax) != 0;
  constexpr bool kPerColumnAmax = (kWhat & kColAmax) != 0;
  constexpr bool kPerColumnSum = (kWhat & kColSum) != 0;
  // The block's own results per row and column, for its cluster to read.
  __shared__ uint32_t row_amax[kPerRow ? kMaxRowsPerChunk : 1];
  __shared__ uint32_t col_amax[kPerColumnAmax ? kStatisticsCols : 1];
  __shared__ float col_sum[kPerColumnSum ? kStatisticsCols : 1];

  let_next_start();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // The grid is rounded up to whole clusters: there may be no such tile or chunk.
  const int64_t tile = blockIdx.x;
  const int64_t chunk = p.from_below ? gridDim.y - 1 - blockIdx.y : blockIdx.y;
  const int64_t col0 = tile * kStatisticsCols + lane * 8;
  const int64_t row_begin = chunk * p.plan.rows_per_chunk;
  const int64_t row_end = min(row_begin + p.plan.rows_per_chunk, p.plan.rows);

  PackedAmax<T> amax[kPerColumnAmax ? kVectors : 1];
  float sum[kPerColumnSum ? kVectors * 8 : 1];
#pragma unroll
  for (int i = 0; i < (kPerColumnAmax ? kVectors : 1); ++i) amax[i].clear();
#pragma unroll
  for (int i = 0; i < (kPerColumnSum ? kVectors * 8 : 1); ++i) sum[i] = 0.0F;

  for (int64_t row = row_begin + warp; row < row_end; row += kWarps) {
    const auto source_row = from.source.row(row);
    const int64_t cols = from.source.cols_of(row);
    Vec8<T> v[kVectors];
    load_vectors(from.source, source_row, col0, 256, cols, v);

    if constexpr (kPerRow) {
      PackedAmax<T> of_row;
      of_row.clear();
#pragma unroll
      for (int i = 0; i < kVectors; ++i) of_row.update(v[i]);
      const uint32_t bits = warp_max(of_row.max_float_bits());
      if (lane == 0) row_amax[row - row_begin] = bits;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr ((kWhat & (kTensorAmax | kColAmax)) != 0) {
        amax[kPerColumnAmax ? i : 0].update(v[i]);
      }
      if constexpr (kPerColumnSum) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i * 8 + j] += v[i].get(j);
      }
    }
  }

  wait_for_previous();
  if constexpr ((kWhat & kTensorAmax) != 0) {
    __shared__ uint32_t scratch[kWarps];
    const uint32_t bits = block_max<kWarps>(amax[0].max_float_bits(), scratch);
    const bool exists = tile < p.plan.col_tiles && chunk < p.plan.row_chunks;
    if (threadIdx.x == 0 && exists) p.tensor_amax[chunk * p.plan.col_tiles + tile] = bits;
  }
  if constexpr (!kPerRow && !kPerColumnAmax && !kPerColumnSum) return;

  // The warps' column results meet in shared memory, 256 columns at a time: [warp][column].
  if constexpr (kPerColumnAmax || kPerColumnSum) {
    __shared__ uint32_t warp_amax[kPerColumnAmax ? kWarps : 1][256];
    __shared__ float warp_sum[kPerColumnSum ? kWarps : 1][256];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if constexpr (kPerColumnAmax) warp_amax[warp][lane * 8 + j] = amax[i].float_bits(j);
        if constexpr (kPerColumnSum) warp_sum[warp][lane * 8 + j] = sum[i * 8 + j];
      }
      __syncthreads();
      if constexpr (kPerColumnAmax) {
        uint32_t bits = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) bits = max(bits, warp_amax[w][threadIdx.x]);
        col_amax[i * 256 + threadIdx.x] = bits;
      }
      if constexpr (kPerColumnSum) {
        float total = 0.0F;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += warp_sum[w][threadIdx.x];
        col_sum[i * 256 + threadIdx.x] = total;
      }
    }
  }

  // The cluster's blocks share the work of joining: block (x, y) takes its part of the rows from
  // the blocks of its row of the cluster, its part of the columns from those of its column.
  const unsigned cx = p.plan.cluster_x;
  const unsigned cy = p.plan.cluster_y;
  const unsigned x = blockIdx.x % cx;
  const unsigned y = blockIdx.y % cy;
  // the block of this column's chunk i, counted downwards
  [[maybe_unused]] const auto rank_of = [&](unsigned i) {
    return (p.from_below ? cy - 1 - i : i) * cx + x;
  };
  cluster_sync();
  if constexpr (kPerRow) {
    const int64_t part = blockIdx.x / cx;
    for (int64_t r = x * kThreads + threadIdx.x; row_begin + r < row_end; r += cx * kThreads) {
      uint32_t bits = 0;
      for (unsigned i = 0; i < cx; ++i) bits = max(bits, in_block(row_amax, y * cx + i)[r]);
      p.row_amax[part * p.plan.rows + row_begin + r] = bits;
    }
  }
  if constexpr (kPerColumnAmax || kPerColumnSum) {
    const int64_t part = chunk / cy;
    for (unsigned c = y * kThreads + threadIdx.x; c < kStatisticsCols; c += cy * kThreads) {
      const int64_t col = tile * kStatisticsCols + c;
      if (col >= p.plan.cols) break;
      uint32_t bits = 0;
      float total = 0.0F;
      for (unsigned i = 0; i < cy; ++i) {
        if constexpr (kPerColumnAmax) bits = max(bits, in_block(col_amax, rank_of(i))[c]);
        if constexpr (kPerColumnSum) total += in_block(col_sum, rank_of(i))[c];
      }
      if constexpr (kPerColumnAmax) p.col_amax[part * p.plan.cols + col] = bits;
      if constexpr (kPerColumnSum) p.col_sum[part * p.plan.cols + col] = total;
    }
  }
  cluster_sync();  // nobody leaves while another block reads its shared memory
}

// The pass over a source.
template <int kWhat, typename Source>
void launch_statistics_of(const Source& source, const StatisticsParams& params,
                          cudaStream_t stream) {
  const auto cx = static_cast<unsigned>(params.plan.cluster_x);
  const auto cy = static_cast<unsigned>(params.plan.cluster_y);
  const dim3 grid(static_cast<unsigned>(round_up(params.plan.col_tiles, cx)),
                  static_cast<unsigned>(round_up(params.plan.row_chunks, cy)));
  launch(statistics_kernel<Source, kWhat>, grid, kThreads, stream,
         From<Source, StatisticsParams>{source, params},
         {.cluster = dim3(cx, cy), .pdl = params.pdl});
}

// What the parameters ask for.
inline int statistics_of(const StatisticsParams& params) {
  return (params.tensor_amax != nullptr ? kTensorAmax : 0) |
         (params.row_amax != nullptr ? kRowAmax : 0) | (params.col_amax != nullptr ? kColAmax : 0) |
         (params.col_sum != nullptr ? kColSum : 0);
}

}  // namespace fp8::core
