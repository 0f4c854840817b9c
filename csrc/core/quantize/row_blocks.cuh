// Rows in blocks of 128 elements, over the sources and sinks of row.cuh: half a warp has a block,
// and nothing waits for the rest of the row. A sink's put_scale takes the block too. Bound by
// bandwidth.
#pragma once

#include "core/quantize/row.cuh"

namespace fp8::core {

constexpr int kBlockLanes = kScaleBlock / 8;
constexpr int kBlocksOfThreads = kThreads / kBlockLanes;  // that a block of threads has
static_assert(kBlockLanes == 16, "the shuffles stay within half a warp");

template <typename Params, typename Format>
__global__ void __launch_bounds__(kThreads) row_blocks_kernel(const Params p) {
  let_next_start();
  const auto source = p.source();
  const auto sink = p.sink();
  const auto blocks = static_cast<unsigned>((sink.cols() + kScaleBlock - 1) / kScaleBlock);
  const unsigned item = blockIdx.x * kBlocksOfThreads + threadIdx.x / kBlockLanes;
  const int64_t index = item / blocks;
  const unsigned block = item % blocks;
  const int64_t cols = source.cols_of(index);
  const int64_t col = block * kScaleBlock + threadIdx.x % kBlockLanes * 8;
  // A source that computes gives an eight beyond the row elements of the same block.
  const auto v = source.load(source.row(index), col, of_eight(cols - col));
  uint32_t bits = amax_bits(v);
#pragma unroll
  for (int distance = 1; distance < kBlockLanes; distance *= 2) {
    bits = max(bits, __shfl_xor_sync(0xFFFFFFFFU, bits, distance));
  }
  const GroupScale group = scale_from_amax(bits, Format::kMax, p.power_of_two);

  wait_for_previous();
  if (!sink.has(index, cols > 0) || col >= sink.cols()) return;
  if (threadIdx.x % kBlockLanes == 0) sink.put_scale(index, group.scale, block);
  const uint2 codes = encode8<Format>(v, [&](int) { return group.quant_multiplier; });
  sink.put(sink.row(index, sink.early(index)), col, codes);
}

// `rows` rows of `cols` columns, the sink's and the source's.
template <typename Format, typename Params>
void launch_row_blocks(const Params& params, int64_t rows, int64_t cols, cudaStream_t stream) {
  const int64_t items = rows * blocks_of(cols);
  require(items < int64_t{1} << 31, "rows in blocks are counted in 31 bits");
  launch(row_blocks_kernel<Params, Format>,
         static_cast<unsigned>(ceil_div(items, kBlocksOfThreads)), kThreads, stream, params);
}

}  // namespace fp8::core
