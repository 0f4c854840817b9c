// Quantization in blocks, row-major, transposed, or both, in one pass: groups of 128 elements of a
// row (and for the transposed copy of a column), or squares of 128 x 128.
//
// A block of 256 threads holds a tile of 128 x 128 elements in registers (16-byte loads of bf16);
// blockwise_tile.cuh quantizes it. Column sums of a tile go to the workspace, and a second, tiny
// kernel adds them in a fixed order. Bound by bandwidth: 2 + 1 + 1 bytes an element.
#pragma once

#include "core/quantize/blockwise_tile.cuh"
#include "core/quantize/source.cuh"

namespace fp8::core {

// Blocks to a multiprocessor: as many as hold their tiles in registers without spilling.
template <typename Source>
constexpr int blockwise_blocks() {
  if constexpr (requires { Source::kBlockwiseMinBlocks; }) return Source::kBlockwiseMinBlocks;
  return sizeof(typename Source::Element) == 4 ? 2 : 4;
}

template <typename Source, typename Format, Granularity kGranularity, bool kData, bool kDataT>
__global__ void __launch_bounds__(kThreads, blockwise_blocks<Source>())
    blockwise_kernel(const From<Source, BlockwiseParams> from) {
  using T = typename Source::Element;
  const BlockwiseParams& p = from.to;
  let_next_start();
  __shared__ BlockShared<T, kGranularity, kDataT> shared;
  const BlockTile at(blockIdx.x, static_cast<unsigned>(p.plan.col_tiles), p.rows, p.cols);
  Vec8<T> v[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    v[r] = from.source.load(from.source.row(at.row0 + r), at.col,
                            r < at.valid_rows ? at.valid_cols : 0);
  }
  wait_for_previous();
  quantize_tile<Format, kGranularity, kData, kDataT>(p, p.data_t.rows, at, v, shared);
}

// The pass over a source.
template <typename Format, Granularity kGranularity, typename Source>
void launch_blockwise_of(const Source& source, const BlockwiseParams& params, cudaStream_t stream) {
  const bool data = params.data.data != nullptr;
  const bool data_t = params.data_t.data != nullptr;
  const auto grid = static_cast<unsigned>(params.plan.col_tiles * params.plan.row_tiles);
  const From<Source, BlockwiseParams> from{source, params};
  const auto go = [&](auto kernel) {
    launch(kernel, grid, kThreads, stream, from, {.pdl = params.pdl});
  };
  if (data && data_t) {
    go(blockwise_kernel<Source, Format, kGranularity, true, true>);
  } else if (data_t) {
    go(blockwise_kernel<Source, Format, kGranularity, false, true>);
  } else {
    go(blockwise_kernel<Source, Format, kGranularity, true, false>);
  }
}

}  // namespace fp8::core
