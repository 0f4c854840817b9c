// First pass over x: maxima of |x| over the tensor, its rows or its columns, and sums of its
// columns.
//
// A block of 8 warps owns rows_per_chunk rows by 1024 columns. A warp takes every eighth row of
// them and reads it with four 16-byte loads a lane (bf16), so each lane keeps its 32 columns to
// itself: column results need no shuffles until the end, when the 8 warps meet in shared memory.
// Bound by bandwidth: 2 bytes an element. Results are partial (one a block and row, column or
// block) and go to fixed places: no zeroing, no atomics, the same bits on every run. The cast pass
// reduces them.
#include "common/reduce.cuh"
#include "quantize/dispatch.cuh"
#include "quantize/kernels.h"

namespace fp8::core {
namespace {

constexpr int kVectors = kStatisticsCols / (32 * 8);  // a lane's vectors of a row

enum Statistics : int { kTensorAmax = 1, kRowAmax = 2, kColAmax = 4, kColSum = 8 };

template <typename T, int kWhat>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const StatisticsParams p) {
  constexpr bool kPerColumnAmax = (kWhat & kColAmax) != 0;
  constexpr bool kPerColumnSum = (kWhat & kColSum) != 0;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t tile = blockIdx.x;
  const int64_t chunk = blockIdx.y;
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
    const T* source = static_cast<const T*>(p.x) + row * p.plan.ld;
    const int64_t cols = row == p.plan.rows - 1 ? p.plan.last_row_cols : p.plan.cols;
    Vec8<T> v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) v[i] = load8(source, col0 + i * 256, cols, p.vectorized);

    if constexpr ((kWhat & kRowAmax) != 0) {
      PackedAmax<T> of_row;
      of_row.clear();
#pragma unroll
      for (int i = 0; i < kVectors; ++i) of_row.update(v[i]);
      const uint32_t bits = warp_max(of_row.max_float_bits());
      if (lane == 0) p.row_amax[tile * p.plan.rows + row] = bits;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr ((kWhat & (kTensorAmax | kColAmax)) != 0)
        amax[kPerColumnAmax ? i : 0].update(v[i]);
      if constexpr (kPerColumnSum) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i * 8 + j] += v[i].get(j);
      }
    }
  }

  if constexpr ((kWhat & kTensorAmax) != 0) {
    __shared__ uint32_t scratch[kWarps];
    const uint32_t bits = block_max<kWarps>(amax[0].max_float_bits(), scratch);
    if (threadIdx.x == 0) p.tensor_amax[chunk * p.plan.col_tiles + tile] = bits;
  }

  // The warps' column results meet in shared memory, 256 columns at a time: [warp][column].
  if constexpr (kPerColumnAmax || kPerColumnSum) {
    __shared__ uint32_t shared_amax[kPerColumnAmax ? kWarps : 1][256];
    __shared__ float shared_sum[kPerColumnSum ? kWarps : 1][256];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if constexpr (kPerColumnAmax) shared_amax[warp][lane * 8 + j] = amax[i].float_bits(j);
        if constexpr (kPerColumnSum) shared_sum[warp][lane * 8 + j] = sum[i * 8 + j];
      }
      __syncthreads();
      const int64_t col = tile * kStatisticsCols + i * 256 + threadIdx.x;
      if (col < p.plan.cols) {
        if constexpr (kPerColumnAmax) {
          uint32_t bits = 0;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) bits = max(bits, shared_amax[w][threadIdx.x]);
          p.col_amax[chunk * p.plan.cols + col] = bits;
        }
        if constexpr (kPerColumnSum) {
          float total = 0.0F;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) total += shared_sum[w][threadIdx.x];
          p.col_sum[chunk * p.plan.cols + col] = total;
        }
      }
    }
  }
}

template <int kWhat>
void launch_what(const StatisticsParams& params, Dtype x_dtype, cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const dim3 grid(static_cast<unsigned>(params.plan.col_tiles),
                    static_cast<unsigned>(params.plan.row_chunks));
    launch(statistics_kernel<T, kWhat>, grid, kThreads, stream, params);
  });
}

}  // namespace

void launch_statistics(const StatisticsParams& params, Dtype x_dtype, cudaStream_t stream) {
  const int what = (params.tensor_amax != nullptr ? kTensorAmax : 0) |
                   (params.row_amax != nullptr ? kRowAmax : 0) |
                   (params.col_amax != nullptr ? kColAmax : 0) |
                   (params.col_sum != nullptr ? kColSum : 0);
  switch (what) {
    case kTensorAmax:
      return launch_what<kTensorAmax>(params, x_dtype, stream);
    case kTensorAmax | kColSum:
      return launch_what<kTensorAmax | kColSum>(params, x_dtype, stream);
    case kColAmax:
      return launch_what<kColAmax>(params, x_dtype, stream);
    case kColAmax | kColSum:
      return launch_what<kColAmax | kColSum>(params, x_dtype, stream);
    case kRowAmax | kColAmax:
      return launch_what<kRowAmax | kColAmax>(params, x_dtype, stream);
    case kRowAmax | kColAmax | kColSum:
      return launch_what<kRowAmax | kColAmax | kColSum>(params, x_dtype, stream);
    default:
      throw Error("fp8: quantize has no statistics pass for this combination");
  }
}

}  // namespace fp8::core
