// amax and cast of a tensor with a scale for each row and column in one launch (cooperative.cuh).
//
// A block's tiles lie one below the other: it joins the maxima of its columns in registers. Those
// of a row come from every column of tiles. Each block leaves its own, and after the first barrier
// of the grid the blocks share the rows out among them: joined once, they are read by all after the
// second. Atomics that joined them on the way took 1.4 to 2.9 times as long as two launches (H200).
#include <cooperative_groups.h>

#include "core/quantize/cooperative.cuh"

namespace fp8::core {
namespace {

constexpr int kReduceRows = 32;  // rows that a block joins at a time, a lane each
static_assert(kColGroups == 2 * kRowsPerThread, "lanes of a row, which max_of_one_row relies on");

// The block's maxima of the 64 columns from col0 on, out of each thread's of its eight, to `out`.
// scratch: kWarps words a column.
template <typename T>
__device__ __forceinline__ void store_column_amax(PackedAmax<T> amax, int64_t col0, int64_t cols,
                                                  uint32_t* scratch, uint32_t* out) {
#pragma unroll
  for (int offset = kColGroups; offset < 32; offset *= 2) {
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) {
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFFU, amax.words[i], offset);
      amax.words[i] = sizeof(T) == 4 ? max(amax.words[i], other) : __vmaxu2(amax.words[i], other);
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < kColGroups) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      scratch[threadIdx.x / 32 * kTileCols + lane * 8 + j] = amax.float_bits(j);
    }
  }
  __syncthreads();
  const int64_t col = col0 + threadIdx.x;
  if (threadIdx.x < kTileCols && col < cols) {
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) bits = max(bits, scratch[w * kTileCols + threadIdx.x]);
    out[col] = bits;
  }
  __syncthreads();
}

// The block's share of the rows: their maxima over the columns of tiles become multipliers and
// scales. scratch: a word a thread.
__device__ __forceinline__ void finish_rows(const CooperativeParams& p, int64_t padded_rows,
                                            float format_max, uint32_t* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kReduceRows;
  const int warp = static_cast<int>(threadIdx.x) / kReduceRows;
  const auto parts = static_cast<int>(p.plan.col_tiles);
  for (int64_t row0 = static_cast<int64_t>(blockIdx.x) * kReduceRows; row0 < padded_rows;
       row0 += static_cast<int64_t>(gridDim.x) * kReduceRows) {
    const int64_t row = row0 + lane;  // padded_rows is a multiple of kReduceRows
    uint32_t bits = max_of<8>(p.row_amax + warp * padded_rows + row, kWarps * padded_rows,
                              (parts - warp + kWarps - 1) / kWarps);
    scratch[threadIdx.x] = bits;
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int w = 1; w < kWarps; ++w) bits = max(bits, scratch[w * kReduceRows + lane]);
      const GroupScale group = scale_from_amax(bits, format_max, p.cast.power_of_two);
      p.row_multiplier[row] = group.quant_multiplier;
      if (row < p.cast.data.rows) p.cast.scale[row] = group.scale;
    }
    __syncthreads();
  }
}

template <typename T, typename Format, bool kData>
__global__ void __launch_bounds__(kThreads, kCooperativeBlocks)
    cooperative_rowwise_kernel(const CooperativeParams p) {
  extern __shared__ uint4 shared[];
  uint32_t* transposed = reinterpret_cast<uint32_t*>(shared + kSlotBytes / 16);
  uint32_t* scratch = transposed;  // not in use
  float* col_multiplier =
      reinterpret_cast<float*>(transposed + kTransposedWords);  // at the same time
  const CastParams& c = p.cast;
  const unsigned tile_col = blockIdx.x % p.plan.col_tiles;
  const unsigned strip = blockIdx.x / p.plan.col_tiles;
  const unsigned row_tiles = p.plan.tiles / p.plan.col_tiles;
  const unsigned first_row = strip * p.plan.tiles_per_block;
  const Tiles<T> tiles(p, shared, first_row * p.plan.col_tiles + tile_col, p.plan.col_tiles,
                       min(p.plan.tiles_per_block, row_tiles - first_row));
  const int64_t padded_rows = static_cast<int64_t>(row_tiles) * kTileRows;
  const int64_t col0 = static_cast<int64_t>(tile_col) * kTileCols;

  PackedAmax<T> col_amax;
  col_amax.clear();
  const int slot = tiles.first_pass([&](int i, const auto& v, const auto& free_slot) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) col_amax.update(v[r]);
    free_slot();
    if constexpr (kData) {
      uint32_t bits[kRowsPerThread];
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) bits[r] = amax_bits(v[r]);
      const uint32_t of_row = max_of_one_row(bits);
      if (threadIdx.x % kColGroups < kRowsPerThread) {
        p.row_amax[tile_col * padded_rows + tiles.row0(i) + tiles.row_in_tile +
                   threadIdx.x % kRowsPerThread] = of_row;
      }
    }
  });
  store_column_amax(col_amax, col0, c.cols, scratch, p.col_amax + strip * c.cols);

  const auto grid = cooperative_groups::this_grid();
  grid.sync();
  column_multipliers(c, col0, Format::kMax, strip == 0, scratch, col_multiplier);
  if constexpr (kData) {
    __syncthreads();
    finish_rows(p, padded_rows, Format::kMax, scratch);
    grid.sync();
  }
  let_next_start();
  __syncthreads();
  float of_col[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) of_col[j] = col_multiplier[tiles.col_in_tile + j];
  __syncthreads();

  const auto row_multipliers = [&](int i) {
    return __ldcg(
        reinterpret_cast<const float4*>(p.row_multiplier + tiles.row0(i) + tiles.row_in_tile));
  };
  [[maybe_unused]] float4 of_row{};
  if constexpr (kData) of_row = row_multipliers(tiles.count - 1);
  tiles.second_pass(slot, [&](int i, const auto& v, const auto& free_slot) {
    const int64_t row = tiles.row0(i) + tiles.row_in_tile;
    const int64_t col = col0 + tiles.col_in_tile;
    uint2 codes[kRowsPerThread];
    if constexpr (kData) {
      const float multiplier[kRowsPerThread] = {of_row.x, of_row.y, of_row.z, of_row.w};
      if (i > 0) of_row = row_multipliers(i - 1);
      uint8_t* out = static_cast<uint8_t*>(c.data.data) + row * c.data.ld + col;
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        codes[r] = keep_first(encode8<Format>(v[r], [&](int) { return multiplier[r]; }),
                              tiles.valid(row, col, r));
        if (row + r < c.data.rows && col < c.data.ld) *reinterpret_cast<uint2*>(out) = codes[r];
        out += c.data.ld;
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      codes[r] = keep_first(encode8<Format>(v[r], [&](int j) { return of_col[j]; }),
                            tiles.valid(row, col, r));
    }
    free_slot();
    // Of two buffers in turn: the barrier between write and read of one frees the other.
    store_transposed_tile(c.data_t, c.data_t.ld, tiles.row0(i), col0, codes,
                          transposed + i % 2 * kTransposedWords);
  });
}

}  // namespace

bool launch_cooperative_rowwise(const CooperativeParams& params, Dtype x_dtype, Dtype dtype,
                                int device, cudaStream_t stream) {
  return launch_of_types(x_dtype, dtype, [&]<typename T, typename Format>() {
    return params.cast.data.data != nullptr
               ? launch_if_it_fits<cooperative_rowwise_kernel<T, Format, true>>(params, device,
                                                                                stream)
               : launch_if_it_fits<cooperative_rowwise_kernel<T, Format, false>>(params, device,
                                                                                 stream);
  });
}

}  // namespace fp8::core
