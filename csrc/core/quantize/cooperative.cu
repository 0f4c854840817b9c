// amax and cast of a tensor with one scale in one launch (cooperative.cuh). A block takes every
// gridDim.x-th tile.
#include <cooperative_groups.h>

#include "core/quantize/cooperative.cuh"

namespace fp8::core {
namespace {

template <typename T, typename Format, bool kData, bool kDataT>
__global__ void __launch_bounds__(kThreads, kCooperativeBlocks)
    cooperative_kernel(const CooperativeParams p) {
  extern __shared__ uint4 shared[];
  uint32_t* transposed = reinterpret_cast<uint32_t*>(shared + kSlotBytes / 16);
  uint32_t* scratch = transposed;  // not in use at the same time
  const CastParams& c = p.cast;
  const Tiles<T> tiles(p, shared, blockIdx.x, gridDim.x,
                       (p.plan.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x);

  PackedAmax<T> amax;
  amax.clear();
  const int slot = tiles.first_pass([&](int, const auto& v, const auto& free_slot) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) amax.update(v[r]);
    free_slot();
  });

  const uint32_t bits = block_max<kWarps>(amax.max_float_bits(), scratch);
  if (threadIdx.x == 0) p.tensor_amax[blockIdx.x] = bits;
  cooperative_groups::this_grid().sync();
  let_next_start();
  const float multiplier = tensor_multiplier(c, Format::kMax, scratch);
  __syncthreads();

  tiles.second_pass(slot, [&](int i, const auto& v, const auto& free_slot) {
    const int64_t row = tiles.row0(i) + tiles.row_in_tile;
    const int64_t col = tiles.col0(i) + tiles.col_in_tile;
    uint2 codes[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      codes[r] = keep_first(encode8<Format>(v[r], [&](int) { return multiplier; }),
                            tiles.valid(row, col, r));
    }
    free_slot();
    if constexpr (kData) {
      uint8_t* out = static_cast<uint8_t*>(c.data.data) + row * c.data.ld + col;
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        if (row + r < c.data.rows && col < c.data.ld) *reinterpret_cast<uint2*>(out) = codes[r];
        out += c.data.ld;
      }
    }
    if constexpr (kDataT) {
      // Of two buffers in turn: the barrier between write and read of one frees the other.
      store_transposed_tile(c.data_t, c.data_t.ld, tiles.row0(i), tiles.col0(i), codes,
                            transposed + i % 2 * kTransposedWords);
    }
  });
}

}  // namespace

bool launch_cooperative_cast(const CooperativeParams& params, Dtype x_dtype, Dtype dtype,
                             int device, cudaStream_t stream) {
  return launch_of_types(x_dtype, dtype, [&]<typename T, typename Format>() {
    const CastParams& cast = params.cast;
    if (cast.data_t.data == nullptr) {
      return launch_if_it_fits<cooperative_kernel<T, Format, true, false>>(params, device, stream);
    }
    if (cast.data.data != nullptr) {
      return launch_if_it_fits<cooperative_kernel<T, Format, true, true>>(params, device, stream);
    }
    return launch_if_it_fits<cooperative_kernel<T, Format, false, true>>(params, device, stream);
  });
}

}  // namespace fp8::core
