// A tile of 128 x 128 elements, in registers of a block of 256 threads, as it is quantized in
// blocks: groups of 128 elements of a row (and for the transposed copy of a column), or the tile's
// square. Every group lies within one tile.
//
// A thread has eight rows by eight columns: row groups meet in shuffles among 16 lanes, column
// groups in shared memory. The thread writes its eight codes of each row, turns its 8 x 8 bytes by
// byte permutes into eight words of eight rows each, and exchanges them through shared memory, so
// that the transposed tile leaves as 128-byte rows. Shared memory holds those words at
// [column][row group ^ column group]: free of bank conflicts for the 8-byte writes and the 16-byte
// reads, without padding.
#pragma once

#include "core/device/codes.cuh"
#include "core/device/dispatch.cuh"
#include "core/device/reduce.cuh"
#include "core/quantize/kernels.h"

namespace fp8::core {

constexpr int kTile = kScaleBlock;
constexpr int kGroups = kTile / 8;  // row groups of a tile, and column groups
static_assert(kGroups * kGroups == kThreads);
static_assert(kGroups == 16, "a row group's lanes are half a warp, which the shuffles rely on");

// What eight warps bring together for each column of the tile, before the codes take its place.
template <typename T>
struct ColumnParts {
  static constexpr int kWords = kTile * sizeof(T) / 4;
  uint32_t amax[kWarps][kWords];  // magnitudes as in PackedAmax
  float sum[kWarps][kTile];
};

// A thread's maxima of its columns are joined over the warp's two row groups and left in `parts`.
template <typename T>
__device__ __forceinline__ void leave_column_amax(PackedAmax<T> amax, ColumnParts<T>& parts) {
#pragma unroll
  for (int i = 0; i < Vec8<T>::kWords; ++i) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFU, amax.words[i], 16);
    amax.words[i] = sizeof(T) == 4 ? max(amax.words[i], other) : __vmaxu2(amax.words[i], other);
  }
  if (threadIdx.x % 32 >= 16) return;
  auto* place = reinterpret_cast<uint4*>(
      &parts.amax[threadIdx.x / 32][threadIdx.x % kGroups * Vec8<T>::kWords]);
#pragma unroll
  for (int i = 0; i < Vec8<T>::kWords / 4; ++i) {
    place[i] = make_uint4(amax.words[4 * i], amax.words[4 * i + 1], amax.words[4 * i + 2],
                          amax.words[4 * i + 3]);
  }
}

// amax of one column of the tile as the bits of a float
template <typename T>
__device__ __forceinline__ uint32_t column_amax_bits(const ColumnParts<T>& parts, int column) {
  uint32_t bits = 0;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) bits = max(bits, parts.amax[w][column]);
    return bits;
  } else {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) bits = __vmaxu2(bits, parts.amax[w][column / 2]);
    const uint32_t half = column % 2 != 0 ? bits >> 16 : bits & 0xFFFFU;
    return __float_as_uint(Vec8<T>::bits_to_float(half));
  }
}

// The same for sums, rows in order within a thread, then row groups, then warps.
template <typename T>
__device__ __forceinline__ void leave_column_sum(const Vec8<T> (&v)[8], ColumnParts<T>& parts) {
  float sum[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    sum[j] = v[0].get(j);
#pragma unroll
    for (int r = 1; r < 8; ++r) sum[j] += v[r].get(j);
    sum[j] += __shfl_xor_sync(0xFFFFFFFFU, sum[j], 16);
  }
  if (threadIdx.x % 32 >= 16) return;
  auto* place = reinterpret_cast<float4*>(&parts.sum[threadIdx.x / 32][threadIdx.x % kGroups * 8]);
  place[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  place[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
}

// Scales of squares: one of this tile, and by the last tile of a row the padding after it.
__device__ __forceinline__ void store_square_scale(float* scale, int64_t row, int64_t col,
                                                   int64_t cols, int64_t ld, float value) {
  if (threadIdx.x == 0) scale[row * ld + col] = value;
  const int64_t padding = col + threadIdx.x;
  if (col == cols - 1 && threadIdx.x > 0 && padding < ld) scale[row * ld + padding] = 1.0F;
}

// Where a tile of a matrix [rows, cols] lies, and a thread's part of it.
struct BlockTile {
  int64_t tile_row;  // in tiles
  int64_t tile_col;
  int row_group = static_cast<int>(threadIdx.x) / kGroups;
  int col_group = static_cast<int>(threadIdx.x) % kGroups;
  int64_t col0;  // of the tile
  int64_t col;   // of the thread
  int64_t row0;  // the same
  int valid_cols;
  int valid_rows;

  __device__ __forceinline__ BlockTile(unsigned tile, unsigned tiles_across, int64_t rows,
                                       int64_t cols)
      : tile_row(tile / tiles_across),
        tile_col(tile % tiles_across),
        col0(tile_col * kTile),
        col(col0 + col_group * 8),
        row0(tile_row * kTile + row_group * 8),
        valid_cols(of_eight(cols - col)),
        valid_rows(of_eight(rows - row0)) {}
};

// A block's shared memory: a tile's column maxima and sums, then its codes on their way.
template <typename T, Granularity kGranularity, bool kDataT>
struct BlockShared {
  union {
    ColumnParts<T> parts;
    alignas(16) uint2 transposed[kDataT ? kTile * kGroups : 1];
  };
  alignas(16) float col_multiplier[kGranularity == Granularity::kBlock1x128 && kDataT ? kTile : 4];
};

// Quantizes a tile, of which the block's threads hold their parts, zeros beyond the matrix, and
// stores it: codes, scales and the sums of its columns, into the padding too. scale_t_ld: from one
// row of the scales of columns to the next. shared: no thread reads what it holds any more. Of `p`,
// x and its layout are of no account.
template <typename Format, Granularity kGranularity, bool kData, bool kDataT, typename T>
__device__ __forceinline__ void quantize_tile(const BlockwiseParams& p, int64_t scale_t_ld,
                                              const BlockTile& at, Vec8<T> (&v)[8],
                                              BlockShared<T, kGranularity, kDataT>& shared) {
  constexpr bool kSquare = kGranularity == Granularity::kBlock128x128;
  // Multipliers, and the way of the scales and column sums.
  float square = 0.0F;  // the tile's
  float of_row = 0.0F;  // of row threadIdx.x % 8 of the row group
  uint32_t row_bits[8];
  PackedAmax<T> amax;  // of the thread's columns
  amax.clear();
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    row_bits[r] = amax_bits(v[r]);
    amax.update(v[r]);
  }
  if constexpr (kSquare) {
    __shared__ uint32_t scratch[kWarps];
    if (p.col_sum != nullptr) leave_column_sum(v, shared.parts);
    const GroupScale group = scale_from_amax(block_max<kWarps>(amax.max_float_bits(), scratch),
                                             Format::kMax, p.power_of_two);
    square = group.quant_multiplier;
    if (kData && at.tile_row * kTile < p.data.rows && at.tile_col < p.plan.scale_cols) {
      store_square_scale(p.scale, at.tile_row, at.tile_col, p.plan.scale_cols, p.plan.scale_ld,
                         group.scale);
    }
    if (kDataT && at.col0 < p.data_t.rows && at.tile_row < p.plan.scale_t_cols) {
      store_square_scale(p.scale_t, at.tile_col, at.tile_row, p.plan.scale_t_cols,
                         p.plan.scale_t_ld, group.scale);
    }
  } else {
    if constexpr (kData) {
      const GroupScale group =
          scale_from_amax(max_of_one_row(row_bits), Format::kMax, p.power_of_two);
      of_row = group.quant_multiplier;
      const int64_t row = at.row0 + threadIdx.x % 8;
      if (threadIdx.x % kGroups < 8 && row < p.data.rows && at.col0 < p.data.ld) {
        p.scale[at.tile_col * p.data.rows + row] = group.scale;
      }
    }
    if constexpr (kDataT) leave_column_amax(amax, shared.parts);
    if (p.col_sum != nullptr) leave_column_sum(v, shared.parts);
    if (kDataT || p.col_sum != nullptr) __syncthreads();
  }
  const int64_t own_col = at.col0 + threadIdx.x;  // of the first 128 threads
  if constexpr (!kSquare && kDataT) {
    if (threadIdx.x < kTile) {
      const GroupScale group =
          scale_from_amax(column_amax_bits(shared.parts, static_cast<int>(threadIdx.x)),
                          Format::kMax, p.power_of_two);
      shared.col_multiplier[threadIdx.x] = group.quant_multiplier;
      if (own_col < p.data_t.rows && at.tile_row * kTile < p.data_t.ld) {
        p.scale_t[at.tile_row * scale_t_ld + own_col] = group.scale;
      }
    }
  }
  if (p.col_sum != nullptr && threadIdx.x < kTile && own_col < p.cols &&
      at.tile_row * kTile < p.rows) {
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.parts.sum[w][threadIdx.x];
    p.col_sum[at.tile_row * p.cols + own_col] = sum;
  }

  uint2 codes[8];
  if constexpr (kData || kSquare) {
    uint8_t* out = static_cast<uint8_t*>(p.data.data) + at.row0 * p.data.ld + at.col;
    const bool writes_cols = at.col < p.data.ld;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      // Zeros of the padding stay zeros, unless the multiplier is NaN: that of a row of padding
      // is 1.
      const float multiplier = !kSquare            ? __shfl_sync(0xFFFFFFFFU, of_row, r, 16)
                               : r < at.valid_rows ? square
                                                   : 1.0F;
      codes[r] = keep_first(encode8<Format>(v[r], [&](int) { return multiplier; }), at.valid_cols);
      if constexpr (kData) {
        if (at.row0 + r < p.data.rows && writes_cols) *reinterpret_cast<uint2*>(out) = codes[r];
        out += p.data.ld;
      }
    }
  }
  if constexpr (!kDataT) return;

  __syncthreads();  // multipliers are there, and `parts` is read
  if constexpr (!kSquare) {
    forget_unpacked(v);
    const auto* multipliers =
        reinterpret_cast<const float4*>(shared.col_multiplier + at.col_group * 8);
    const float4 m0 = multipliers[0];
    const float4 m1 = multipliers[1];
    const float m[8] = {m0.x, m0.y, m0.z, m0.w, m1.x, m1.y, m1.z, m1.w};
#pragma unroll
    for (int r = 0; r < 8; ++r) codes[r] = encode8<Format>(v[r], [&](int j) { return m[j]; });
  }
  const int place = at.row_group ^ at.col_group;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // four columns each
    const auto word = [&](int r) { return half == 0 ? codes[r].x : codes[r].y; };
    uint32_t upper[4];
    uint32_t lower[4];
    transpose_bytes(word(0), word(1), word(2), word(3), upper);
    transpose_bytes(word(4), word(5), word(6), word(7), lower);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      shared.transposed[(at.col_group * 8 + half * 4 + j) * kGroups + place] =
          keep_first(make_uint2(upper[j], lower[j]), at.valid_rows);
    }
  }
  __syncthreads();
  // 128 columns of 128 codes: eight lanes write one column's 128 bytes, 16 bytes each.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = i * (kTile / 4) + static_cast<int>(threadIdx.x) / 8;
    const int chunk = static_cast<int>(threadIdx.x) % 8;
    const int64_t out_row = at.col0 + column;
    const int64_t out_col = at.tile_row * kTile + chunk * 16;
    if (out_row < p.data_t.rows && out_col < p.data_t.ld) {
      // Row groups 2 chunk and 2 chunk + 1 lie side by side, in this order or the other.
      const int swizzle = column / 8;
      const uint4 q = reinterpret_cast<const uint4*>(
          shared.transposed)[column * (kGroups / 2) + (chunk ^ (swizzle / 2))];
      const uint4 ordered = swizzle % 2 == 0 ? q : make_uint4(q.z, q.w, q.x, q.y);
      *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.data_t.data) + out_row * p.data_t.ld +
                                out_col) = ordered;
    }
  }
}

}  // namespace fp8::core
