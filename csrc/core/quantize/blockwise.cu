// Blocks of a matrix in memory: the kernel of blockwise.cuh, and the sums of its columns.
#include "core/quantize/blockwise.cuh"

namespace fp8::core {
namespace {

constexpr int kSumCols = 32;  // columns of a block of the sum kernel
constexpr int kSumReaders = kThreads / kSumCols;

// Sums of columns over the row tiles: every eighth tile a thread, then the eight in order.
__global__ void __launch_bounds__(kThreads) column_sum_kernel(const ColumnSumParams p) {
  __shared__ float partial[kSumReaders][kSumCols];
  let_next_start();
  wait_for_previous();
  const int column = static_cast<int>(threadIdx.x) % kSumCols;
  const int reader = static_cast<int>(threadIdx.x) / kSumCols;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kSumCols + column;
  float sum = 0.0F;
  if (col < p.cols) {
#pragma unroll 4
    for (int64_t part = reader; part < p.parts; part += kSumReaders) {
      sum += __ldcg(p.col_sum + part * p.cols + col);
    }
  }
  partial[reader][column] = sum;
  __syncthreads();
  if (reader != 0 || col >= p.cols) return;
#pragma unroll
  for (int i = 1; i < kSumReaders; ++i) sum += partial[i][column];
  store_sum(p.column_sum, p.column_sum_dtype, col, sum);
}

}  // namespace

void launch_blockwise(const BlockwiseParams& params, Dtype x_dtype, Dtype dtype,
                      Granularity granularity, cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      using T = typename decltype(input)::type;
      using Format = typename decltype(format)::type;
      const auto source = matrix_source<T>(params);
      if (granularity == Granularity::kBlock1x128) {
        launch_blockwise_of<Format, Granularity::kBlock1x128>(source, params, stream);
      } else {
        launch_blockwise_of<Format, Granularity::kBlock128x128>(source, params, stream);
      }
    });
  });
}

void launch_column_sum(const ColumnSumParams& params, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(ceil_div(params.cols, kSumCols));
  launch(column_sum_kernel, grid, kThreads, stream, params, {.pdl = params.pdl});
}

}  // namespace fp8::core
