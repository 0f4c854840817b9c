// Transposed copies of groups of rows, each group and column with a scale of its own: the operands
// of weight gradients (groups of tokens), and weights transposed for dgrad (groups of equal
// extent).
//
// Two launches over 128 x 64 tiles, which never cross a group: maxima of the columns, joined by an
// integer atomicMax (a maximum has no order, so the bits are the same on every run), then cast and
// transpose as in core/quantize/cast.cu. A weight's maxima may be known, from the pass over its
// rows (core/quantize/rowwise.cu): then one launch. A tile of a ragged group is found in the tile
// table; its rows may be gathered through `source`. Bound by bandwidth: 2 + 2 + 1 bytes an element;
// where groups are small their tiles are not full, and what each block waits for, the table, x and
// the maxima, counts more than its bytes: so a block takes several.
#include "core/device/device.h"
#include "core/grouped/device.cuh"
#include "core/quantize/tile.cuh"

namespace fp8::core {
namespace {

static_assert(kTileRows == kGroupTileRows);

struct ColumnsParams {
  GroupColumnsArgs args;
  unsigned amax_parts;      // warps to a tile: 1 or kRowParts
  unsigned amax_chunks;     // blocks to a row of tiles
  unsigned cast_chunks;     // the same
  int64_t tiles_per_group;  // uniform
  bool vectorized;
};

// Column tiles of a block that casts, where there are at least kManyTiles tiles to a
// multiprocessor.
constexpr int kCastTiles = 4;
constexpr int64_t kManyTiles = 32;

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

// Rows that may be gathered.
template <typename T>
__device__ __forceinline__ GatheredSource<T> gathered(const ColumnsParams& p) {
  return {{static_cast<const T*>(p.args.x), INT64_MAX, p.args.cols, p.args.ld, p.vectorized},
          p.args.source,
          p.args.copies};
}

// A warp takes maxima alone, lane l of columns 8 * (l % 8) and on: no barrier, and loads of
// kRowsInFlight rows a lane on their way, however few rows a group has. Where tiles are many, a
// warp has one, a block as many column tiles as warps; where they are few, kRowParts warps share
// one.
constexpr int kRowsInFlight = 4;
constexpr int kRowParts = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads) group_amax_kernel(const ColumnsParams p) {
  const unsigned chunk = blockIdx.x % p.amax_chunks;
  const Tile tile = find_tile(p, blockIdx.x / p.amax_chunks);
  const unsigned warp = chunk * kWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t col = static_cast<int64_t>(warp / p.amax_parts) * kTileCols + lane % kColGroups * 8;
  constexpr int kLanesOfColumn = 32 / kColGroups;
  const int part_rows = static_cast<int>(kTileRows) / static_cast<int>(p.amax_parts);
  const int first = static_cast<int>(warp % p.amax_parts) * part_rows;
  const int end = tile.group >= 0 && col < p.args.cols ? min(tile.rows, first + part_rows) : 0;
  const int valid_cols = of_eight(p.args.cols - col);
  const GatheredSource<T> source = gathered<T>(p);
  PackedAmax<T> amax;
  amax.clear();
  for (int row = first + lane / kColGroups; row < end; row += kRowsInFlight * kLanesOfColumn) {
    Vec8<T> v[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int own = row + r * kLanesOfColumn;
      v[r] =
          source.load(source.row(own < end ? tile.row + own : 0), col, own < end ? valid_cols : 0);
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) amax.update(v[r]);
  }
  let_next_start();  // not before: blocks of the cast that wait would take the place of these
#pragma unroll
  for (int offset = kColGroups; offset < 32; offset *= 2) {
    Vec8<T> other;
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) {
      other.words[i] = __shfl_xor_sync(0xFFFFFFFFU, amax.words[i], offset);
    }
    amax.update(other);
  }
  if (first >= end || lane >= kColGroups) return;
  uint32_t* const to = p.args.amax + tile.group * p.args.cols + col;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t bits = amax.float_bits(j);
    if (bits != 0 && j < valid_cols) atomicMax(to + j, bits);
  }
}

// kTiles column tiles of a block, one after the other: the loads of the next are on their way while
// one is written.
template <typename T, typename Format, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles > 1 && sizeof(T) < 4 ? 4 : 1)
    group_cast_kernel(const ColumnsParams p) {
  constexpr int kBuffers = kTiles > 1 ? 2 : 1;
  __shared__ alignas(16) uint32_t transposed[kBuffers][kTransposedWords];
  __shared__ float multiplier[kTiles * kTileCols];
  let_next_start();
  const unsigned chunk = blockIdx.x % p.cast_chunks;
  const Tile tile = find_tile(p, blockIdx.x / p.cast_chunks);
  if (tile.group < 0) {
    wait_for_previous();
    return;
  }
  const int64_t col0 = static_cast<int64_t>(chunk) * (kTiles * kTileCols);
  const int row0 = static_cast<int>(threadIdx.x) / kColGroups * kRowsPerThread;
  const int col_group = static_cast<int>(threadIdx.x) % kColGroups;
  const GatheredSource<T> source = gathered<T>(p);
  const T* rows[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    // A tile that fills the columns up has no rows, and its first may lie behind the last.
    rows[r] = source.row(row0 + r < tile.rows ? tile.row + row0 + r : 0);
  }
  Vec8<T> next[kRowsPerThread];
  const auto load = [&](int64_t col) {
    const int valid_cols = of_eight(p.args.cols - col);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      next[r] = source.load(rows[r], col, row0 + r < tile.rows ? valid_cols : 0);
    }
  };
  load(col0 + col_group * 8);
  wait_for_previous();  // for the maxima; x was complete before
  static_assert(kTiles * kTileCols <= kThreads);
  if (threadIdx.x < kTiles * kTileCols) {
    const int64_t c = col0 + threadIdx.x;
    const int64_t place = tile.group * p.args.cols + c;
    const uint32_t bits = c < p.args.cols ? __ldcg(p.args.amax + place) : 0;
    const GroupScale group = scale_from_amax(bits, Format::kMax, p.args.power_of_two);
    multiplier[threadIdx.x] = group.quant_multiplier;
    if (tile.first && c < p.args.cols) p.args.scale_t[place] = group.scale;
  }
  __syncthreads();
  const Destination to{static_cast<uint8_t*>(p.args.data_t) + tile.column, p.args.cols,
                       p.args.ld_t};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t tile_col = col0 + i * kTileCols;
    if (tile_col >= p.args.cols) return;
    const int64_t col = tile_col + col_group * 8;
    Vec8<T> v[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) v[r] = next[r];
    if (i + 1 < kTiles) load(col + kTileCols);
    uint2 codes[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      codes[r] = encode8<Format>(
          v[r], [&](int j) { return multiplier[i * kTileCols + col_group * 8 + j]; });
      codes[r] = keep_first(codes[r], row0 + r < tile.rows ? of_eight(p.args.cols - col) : 0);
    }
    store_transposed_tile(to, tile.columns, 0, tile_col, codes, transposed[i % kBuffers]);
  }
}

}  // namespace

void quantize_group_columns(const GroupColumnsArgs& args, Stream stream) {
  require(args.cols > 0 && args.groups > 0, "quantize_group_columns expects columns and groups");
  require(on_16_bytes(args.data_t) && args.ld_t % 16 == 0 && on_16_bytes(args.tiles),
          "quantize_group_columns expects 16-byte aligned destinations");
  const DeviceInfo device = current_device();
  const int64_t tiles_per_group = ceil_div(args.ld_t, kTileRows);
  const int64_t tiles = args.tiles != nullptr ? args.tile_count : args.groups * tiles_per_group;
  const int64_t col_tiles = ceil_div(args.cols, kTileCols);
  const bool many = tiles * col_tiles >= device.sm_count * kManyTiles;
  const int64_t parts = many ? 1 : kRowParts;
  const int64_t cast_tiles = many ? kCastTiles : 1;
  const ColumnsParams params{
      .args = args,
      .amax_parts = static_cast<unsigned>(parts),
      .amax_chunks = static_cast<unsigned>(ceil_div(col_tiles * parts, kWarps)),
      .cast_chunks = static_cast<unsigned>(ceil_div(col_tiles, cast_tiles)),
      .tiles_per_group = tiles_per_group,
      .vectorized = on_16_bytes(args.x) && args.ld * dtype_bytes(args.x_dtype) % 16 == 0};
  require(tiles > 0 && tiles * params.cast_chunks <= kMaxGridX,
          "quantize_group_columns has too many tiles");
  if (!args.amax_is_known) {
    FP8_CUDA_CHECK(cudaMemsetAsync(
        args.amax, 0, static_cast<size_t>(args.groups * args.cols) * sizeof(uint32_t), stream));
  }
  dispatch_input(args.x_dtype, [&](auto input) {
    using T = typename decltype(input)::type;
    if (!args.amax_is_known) {
      launch(group_amax_kernel<T>, static_cast<unsigned>(tiles * params.amax_chunks), kThreads,
             stream, params);
    }
    const LaunchOptions overlapping{.pdl = !args.amax_is_known && has_hopper_launches(device)};
    const auto grid = static_cast<unsigned>(tiles * params.cast_chunks);
    dispatch_format(args.dtype, [&](auto format) {
      using Format = typename decltype(format)::type;
      if (many) {
        launch(group_cast_kernel<T, Format, kCastTiles>, grid, kThreads, stream, params,
               overlapping);
      } else {
        launch(group_cast_kernel<T, Format, 1>, grid, kThreads, stream, params, overlapping);
      }
    });
  });
}

}  // namespace fp8::core
