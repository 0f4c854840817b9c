// A tile of 128 x 64 elements as a block of 256 threads casts it.
//
// A thread reads four rows by eight columns (16-byte loads of bf16), writes its eight codes of each
// row, turns the 4 x 8 bytes by byte permutes into eight words of four rows each, and exchanges
// them through shared memory, so that the transposed tile leaves as 128-byte rows. Shared memory
// holds a word per column and row group at [column][row group ^ 4 * (column / 8)]: free of bank
// conflicts for the 4-byte writes and the 16-byte reads, without padding.
#pragma once

#include "core/device/codes.cuh"
#include "core/device/reduce.cuh"
#include "core/quantize/history.cuh"
#include "core/quantize/kernels.h"
#include "core/quantize/source.cuh"

namespace fp8::core {

constexpr int kRowsPerThread = 4;
constexpr int kGroups = kTileRows / kRowsPerThread;  // row groups of a tile, also words of a column
constexpr int kColGroups = kTileCols / 8;            // column groups of a tile
constexpr int kTransposedWords = kTileCols * kGroups;  // of shared memory, for a tile on its way
static_assert(kGroups * kColGroups == kThreads);
static_assert(kGroups == 32, "the swizzle spreads a column over the 32 banks");

// A thread's part of a tile, from row0 and col on, of a source (source.cuh); zeros beyond `rows`
// rows and `valid_cols` columns.
template <typename Source>
__device__ __forceinline__ void load_tile(const Source& source, int64_t row0, int64_t rows,
                                          int64_t col, int valid_cols,
                                          Vec8<typename Source::Element> (&v)[kRowsPerThread]) {
  if constexpr (Fetches<Source>) {
    typename Source::Raw raw[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      raw[r] = source.fetch(source.row(r < rows ? row0 + r : 0), col);
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r)
      v[r] = source.finish(raw[r], r < rows ? valid_cols : 0);
  } else {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const bool exists = r < rows;
      v[r] = source.load(source.row(exists ? row0 + r : 0), col, exists ? valid_cols : 0);
    }
  }
}

// The transposed tile of a matrix's rows from row0 and columns from col0, into columns of data_t
// below `end`. Every thread of the block calls it. transposed: kTransposedWords words of shared
// memory, 16-byte aligned, which no thread reads any more.
__device__ __forceinline__ void store_transposed_tile(const Destination& data_t, int64_t end,
                                                      int64_t row0, int64_t col0,
                                                      const uint2 (&codes)[kRowsPerThread],
                                                      uint32_t* transposed) {
  const int group = static_cast<int>(threadIdx.x) / kColGroups;
  const int col_group = static_cast<int>(threadIdx.x) % kColGroups;
  uint32_t words[8];
  transpose_bytes(codes[0].x, codes[1].x, codes[2].x, codes[3].x, words);
  transpose_bytes(codes[0].y, codes[1].y, codes[2].y, codes[3].y, words + 4);
  const int place = group ^ (4 * col_group);
#pragma unroll
  for (int j = 0; j < 8; ++j) transposed[(col_group * 8 + j) * kGroups + place] = words[j];
  __syncthreads();
  // 64 columns of 128 codes: eight lanes write one column's 128 bytes, 16 bytes each.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int column = i * (kTileCols / 2) + static_cast<int>(threadIdx.x) / 8;
    const int chunk = static_cast<int>(threadIdx.x) % 8;
    const int64_t out_row = col0 + column;
    const int64_t out_col = row0 + chunk * 16;
    if (out_row < data_t.rows && out_col < end) {
      const uint4 q = *reinterpret_cast<const uint4*>(
          &transposed[column * kGroups + 4 * (chunk ^ (column / 8))]);
      *reinterpret_cast<uint4*>(static_cast<uint8_t*>(data_t.data) + out_row * data_t.ld +
                                out_col) = q;
    }
  }
}

// Maximum of source[i * step], i < count. kBatch loads are in flight at a time, also where fewer
// are left: a loop that the compiler unrolls takes what is left one by one, each a round trip to
// L2.
template <int kBatch>
__device__ __forceinline__ uint32_t max_of(const uint32_t* source, int64_t step, int count) {
  uint32_t bits = 0;
  for (int begin = 0; begin < count; begin += kBatch) {
    uint32_t batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i] = begin + i < count ? __ldcg(source) : 0;
      source += step;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) bits = max(bits, batch[i]);
  }
  return bits;
}

// The tensor's scale, the same in every block; block 0 writes it, and the record of the call.
__device__ __forceinline__ float tensor_multiplier(const CastParams& p, float format_max,
                                                   uint32_t* scratch) {
  const bool writes = blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0;
  if (p.static_scale != nullptr) {
    const float scale = __ldg(p.static_scale);
    if (writes && p.scale != nullptr) *p.scale = scale;
    return __fdiv_rn(1.0F, scale);
  }
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t bits = max_of<8>(p.tensor_amax + thread, kThreads,
                            (p.tensor_parts - thread + kThreads - 1) / kThreads);
  bits = block_max<kWarps>(bits, scratch);
  const GroupScale group = scale_from_amax(bits, format_max, p.power_of_two);
  if (writes) {
    if (p.scale != nullptr) *p.scale = group.scale;
    if (p.amax_out != nullptr) *p.amax_out = __uint_as_float(bits);
    if (p.history != nullptr) {
      leave_record(p.history, __ldcg(p.history + kHistoryCount), bits, bits, kNoFingerprint);
      p.history[kHistoryGuess] = 0;
    }
  }
  return group.quant_multiplier;
}

// quant_multipliers of columns [col0, col0 + 64) into `multiplier`; `writes_scale` blocks store
// scale_t too.
__device__ __forceinline__ void column_multipliers(const CastParams& p, int64_t col0,
                                                   float format_max, bool writes_scale,
                                                   uint32_t* partial, float* multiplier) {
  const int column = threadIdx.x % kTileCols;
  const int part0 = static_cast<int>(threadIdx.x) / kTileCols;
  const int64_t col = col0 + column;
  constexpr int kReaders = kThreads / kTileCols;  // threads of a column
  uint32_t bits = 0;
  if (col < p.cols) {
    bits = max_of<4>(p.col_amax + part0 * p.cols + col, kReaders * p.cols,
                     (p.col_parts - part0 + kReaders - 1) / kReaders);
  }
  partial[threadIdx.x] = bits;
  __syncthreads();
  if (threadIdx.x < kTileCols) {
#pragma unroll
    for (int i = 1; i < kThreads / kTileCols; ++i)
      bits = max(bits, partial[i * kTileCols + column]);
    const GroupScale group = scale_from_amax(bits, format_max, p.power_of_two);
    multiplier[column] = group.quant_multiplier;
    if (writes_scale && col < p.data_t.rows) p.scale_t[col] = group.scale;
  }
}

}  // namespace fp8::core
