// Transposed copies of groups of rows, each group and column with a scale of its own: the operands
// of weight gradients (groups of tokens), and weights transposed for dgrad (groups of equal
// extent).
//
// Two launches over 128 x 64 tiles, which never cross a group: maxima of the columns, joined by an
// integer atomicMax (a maximum has no order, so the bits are the same on every run), then cast and
// transpose as in core/quantize/cast.cu. A weight's maxima may be known, from the pass over its
// rows (core/quantize/rowwise.cu): then one launch. A tile of a ragged group is found in the tile
// table; its rows may be gathered through `source`. Bound by bandwidth: 2 + 2 + 1 bytes an element.
#include "core/device/device.h"
#include "core/grouped/device.cuh"
#include "core/quantize/tile.cuh"

namespace fp8::core {
namespace {

static_assert(kTileRows == kGroupTileRows);

struct ColumnsParams {
  GroupColumnsArgs args;
  int64_t col_tiles;
  int64_t tiles_per_group;  // uniform
  bool vectorized;
};

struct Tile {
  int64_t row;
  int rows;
  int columns;  // of the transposed copy
  int64_t column;
  int64_t group;
  bool first;
};

__device__ __forceinline__ Tile find_tile(const ColumnsParams& p, int64_t index) {
  if (p.args.tiles != nullptr) {
    const int4 t = __ldg(reinterpret_cast<const int4*>(p.args.tiles) + index);
    return {t.x, t.y & 0xFF, t.y >> 8 & 0xFF, t.z, t.w, (t.y >> 16 & 1) != 0};
  }
  const int64_t group = index / p.tiles_per_group;
  const int64_t done = (index - group * p.tiles_per_group) * kTileRows;
  const auto left = [&](int64_t extent) {
    return static_cast<int>(max(min(extent - done, kTileRows), int64_t{0}));
  };
  return {group * p.args.group_rows + done,
          left(p.args.group_rows),
          left(p.args.ld_t),
          group * p.args.cols * p.args.ld_t + done,
          group,
          done == 0};
}

// A thread's part of a tile, whose rows may be gathered.
template <typename T>
__device__ __forceinline__ void load_rows(const ColumnsParams& p, const Tile& tile, int row_group,
                                          int64_t col, int valid_cols,
                                          Vec8<T> (&v)[kRowsPerThread]) {
  const int done = row_group * kRowsPerThread;
  const GatheredSource<T> source{
      {static_cast<const T*>(p.args.x), INT64_MAX, p.args.cols, p.args.ld, p.vectorized},
      p.args.source,
      p.args.copies};
  load_tile(source, tile.row + done, tile.rows - done, col, valid_cols, v);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) group_amax_kernel(const ColumnsParams p) {
  __shared__ uint32_t warp_amax[kWarps][kTileCols];
  let_next_start();
  const Tile tile = find_tile(p, blockIdx.x / p.col_tiles);
  if (tile.group < 0 || tile.rows == 0) return;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x % p.col_tiles) * kTileCols;
  const int col_group = threadIdx.x % kColGroups;
  Vec8<T> v[kRowsPerThread];
  const int64_t col = col0 + col_group * 8;
  load_rows(p, tile, static_cast<int>(threadIdx.x) / kColGroups, col, of_eight(p.args.cols - col),
            v);
  PackedAmax<T> amax;
  amax.clear();
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) amax.update(v[r]);
    // The four row groups of a warp: lanes that differ in bits 3 and 4.
#pragma unroll
  for (int offset = kColGroups; offset < 32; offset *= 2) {
    Vec8<T> other;
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) {
      other.words[i] = __shfl_xor_sync(0xFFFFFFFFU, amax.words[i], offset);
    }
    amax.update(other);
  }
  if (threadIdx.x % 32 < kColGroups) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      warp_amax[threadIdx.x / 32][col_group * 8 + j] = amax.float_bits(j);
    }
  }
  __syncthreads();
  const int64_t own_col = col0 + threadIdx.x;
  if (threadIdx.x >= kTileCols || own_col >= p.args.cols) return;
  uint32_t bits = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) bits = max(bits, warp_amax[w][threadIdx.x]);
  if (bits != 0) atomicMax(p.args.amax + tile.group * p.args.cols + own_col, bits);
}

template <typename T, typename Format>
__global__ void __launch_bounds__(kThreads) group_cast_kernel(const ColumnsParams p) {
  __shared__ alignas(16) uint32_t transposed[kTransposedWords];
  __shared__ float multiplier[kTileCols];
  let_next_start();
  const Tile tile = find_tile(p, blockIdx.x / p.col_tiles);
  if (tile.group < 0) {
    wait_for_previous();
    return;
  }
  const int64_t col0 = static_cast<int64_t>(blockIdx.x % p.col_tiles) * kTileCols;
  const int row_group = threadIdx.x / kColGroups;
  const int col_group = threadIdx.x % kColGroups;
  const int64_t col = col0 + col_group * 8;
  Vec8<T> v[kRowsPerThread];
  const int valid_cols = of_eight(p.args.cols - col);
  load_rows(p, tile, row_group, col, valid_cols, v);
  wait_for_previous();  // for the maxima; x was complete before
  if (threadIdx.x < kTileCols) {
    const int64_t c = col0 + threadIdx.x;
    const int64_t place = tile.group * p.args.cols + c;
    const uint32_t bits = c < p.args.cols ? __ldcg(p.args.amax + place) : 0;
    const GroupScale group = scale_from_amax(bits, Format::kMax, p.args.power_of_two);
    multiplier[threadIdx.x] = group.quant_multiplier;
    if (tile.first && c < p.args.cols) p.args.scale_t[place] = group.scale;
  }
  __syncthreads();
  uint2 codes[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    codes[r] =
        keep_first(encode8<Format>(v[r], [&](int j) { return multiplier[col_group * 8 + j]; }),
                   row_group * kRowsPerThread + r < tile.rows ? valid_cols : 0);
  }
  const Destination to{static_cast<uint8_t*>(p.args.data_t) + tile.column, p.args.cols,
                       p.args.ld_t};
  store_transposed_tile(to, tile.columns, 0, col0, codes, transposed);
}

}  // namespace

void quantize_group_columns(const GroupColumnsArgs& args, Stream stream) {
  require(args.cols > 0 && args.groups > 0, "quantize_group_columns expects columns and groups");
  require(on_16_bytes(args.data_t) && args.ld_t % 16 == 0 && on_16_bytes(args.tiles),
          "quantize_group_columns expects 16-byte aligned destinations");
  const int64_t tiles_per_group = ceil_div(args.ld_t, kTileRows);
  const ColumnsParams params{
      .args = args,
      .col_tiles = ceil_div(args.cols, kTileCols),
      .tiles_per_group = tiles_per_group,
      .vectorized = on_16_bytes(args.x) && args.ld * dtype_bytes(args.x_dtype) % 16 == 0};
  const int64_t tiles = args.tiles != nullptr ? args.tile_count : args.groups * tiles_per_group;
  const int64_t blocks = tiles * params.col_tiles;
  require(blocks > 0 && blocks <= kMaxGridX, "quantize_group_columns has too many tiles");
  if (!args.amax_is_known) {
    FP8_CUDA_CHECK(cudaMemsetAsync(
        args.amax, 0, static_cast<size_t>(args.groups * args.cols) * sizeof(uint32_t), stream));
  }
  dispatch_input(args.x_dtype, [&](auto input) {
    using T = typename decltype(input)::type;
    const auto grid = static_cast<unsigned>(blocks);
    if (!args.amax_is_known) launch(group_amax_kernel<T>, grid, kThreads, stream, params);
    dispatch_format(args.dtype, [&](auto format) {
      launch(group_cast_kernel<T, typename decltype(format)::type>, grid, kThreads, stream, params,
             {.pdl = !args.amax_is_known && has_hopper_launches(current_device())});
    });
  });
}

}  // namespace fp8::core
