// Second pass over x: cast to FP8, row-major, transposed, or both.
//
// A block of 256 threads casts 128 x 64 tiles of x, a few one below the other. A thread reads four
// rows by eight columns (16-byte loads of bf16), writes its eight codes of each row, turns the 4 x
// 8 bytes by byte permutes into eight words of four rows each, and exchanges them through shared
// memory, so that the transposed tile leaves as 128-byte rows. Shared memory holds a word per
// column and row group at [column][row group ^ 4 * (column / 8)]: free of bank conflicts for the
// 4-byte writes and the 16-byte reads, without padding. Strips are taken from the bottom up: the
// first pass ended there, so part of x is still in L2. Bound by bandwidth: 2 + 1 + 1 bytes an
// element.
#include "common/reduce.cuh"
#include "quantize/dispatch.cuh"
#include "quantize/kernels.h"

namespace fp8::core {
namespace {

constexpr int kRowsPerThread = 4;
constexpr int kGroups = kTileRows / kRowsPerThread;  // row groups of a tile, also words of a column
constexpr int kColGroups = kTileCols / 8;            // column groups of a tile
static_assert(kGroups * kColGroups == kThreads);
static_assert(kGroups == 32, "the swizzle spreads a column over the 32 banks");

// out[j] = byte j of rows a, b, c, d, for the four bytes of a word
__device__ __forceinline__ void transpose_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                                uint32_t* out) {
  const uint32_t ab01 = __byte_perm(a, b, 0x5140);
  const uint32_t cd01 = __byte_perm(c, d, 0x5140);
  const uint32_t ab23 = __byte_perm(a, b, 0x7362);
  const uint32_t cd23 = __byte_perm(c, d, 0x7362);
  out[0] = __byte_perm(ab01, cd01, 0x5410);
  out[1] = __byte_perm(ab01, cd01, 0x7632);
  out[2] = __byte_perm(ab23, cd23, 0x5410);
  out[3] = __byte_perm(ab23, cd23, 0x7632);
}

template <typename T, typename Format>
__device__ __forceinline__ uint2 encode8(const Vec8<T>& v, const float (&m)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = encode2<Format>(v.get(2 * i) * m[2 * i], v.get(2 * i + 1) * m[2 * i + 1]);
  }
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

__device__ __forceinline__ void store_sum(void* out, Dtype dtype, int64_t i, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(out)[i] = value;
  } else if (dtype == Dtype::kBFloat16) {
    static_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(out)[i] = __float2half_rn(value);
  }
}

// The tensor's scale, the same in every block; block 0 writes it.
__device__ __forceinline__ float tensor_multiplier(const CastParams& p, float format_max,
                                                   uint32_t* scratch) {
  const bool writes = blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0;
  if (p.static_scale != nullptr) {
    const float scale = __ldg(p.static_scale);
    if (writes && p.scale != nullptr) *p.scale = scale;
    return __fdiv_rn(1.0F, scale);
  }
  uint32_t bits = 0;
  for (int64_t i = threadIdx.x; i < p.tensor_parts; i += kThreads) {
    bits = max(bits, __ldg(p.tensor_amax + i));
  }
  bits = block_max<kWarps>(bits, scratch);
  const GroupScale group = scale_from_amax(bits, format_max);
  if (writes) {
    if (p.scale != nullptr) *p.scale = group.scale;
    if (p.amax_out != nullptr) *p.amax_out = __uint_as_float(bits);
  }
  return group.quant_multiplier;
}

// quant_multipliers of columns [col0, col0 + 64) into `multiplier`; `writes_scale` blocks store
// scale_t too.
__device__ __forceinline__ void column_multipliers(const CastParams& p, int64_t col0,
                                                   float format_max, bool writes_scale,
                                                   uint32_t* partial, float* multiplier) {
  const int column = threadIdx.x % kTileCols;
  const int part0 = threadIdx.x / kTileCols;
  const int64_t col = col0 + column;
  uint32_t bits = 0;
  if (col < p.cols) {
#pragma unroll 4
    for (int64_t part = part0; part < p.col_parts; part += kThreads / kTileCols) {
      bits = max(bits, __ldg(p.col_amax + part * p.cols + col));
    }
  }
  partial[threadIdx.x] = bits;
  __syncthreads();
  if (threadIdx.x < kTileCols) {
#pragma unroll
    for (int i = 1; i < kThreads / kTileCols; ++i)
      bits = max(bits, partial[i * kTileCols + column]);
    const GroupScale group = scale_from_amax(bits, format_max);
    multiplier[column] = group.quant_multiplier;
    if (writes_scale && col < p.data_t.rows) p.scale_t[col] = group.scale;
  }
}

// Sums of columns [col0, col0 + 64) over the row chunks, in a fixed order.
__device__ __forceinline__ void finish_column_sums(const CastParams& p, int64_t col0,
                                                   float* partial) {
  const int column = threadIdx.x % kTileCols;
  const int64_t col = col0 + column;
  float sum = 0.0F;
  if (col < p.cols) {
    for (int64_t part = threadIdx.x / kTileCols; part < p.col_parts; part += kThreads / kTileCols) {
      sum += __ldg(p.col_sum + part * p.cols + col);
    }
  }
  __syncthreads();
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < kTileCols && col < p.cols) {
#pragma unroll
    for (int i = 1; i < kThreads / kTileCols; ++i) sum += partial[i * kTileCols + column];
    store_sum(p.column_sum, p.column_sum_dtype, col, sum);
  }
}

// Blocks to a multiprocessor: enough loads in flight to saturate memory, few enough that no
// register spills.
template <typename T, Granularity kGranularity>
constexpr int kMinBlocks = sizeof(T) == 4 || kGranularity == Granularity::kRowwise ? 3 : 5;

// amax of the tile's row that this thread looks after; the first 128 threads have one.
__device__ __forceinline__ uint32_t row_amax_bits(const CastParams& p, int64_t tile) {
  const int64_t row = tile * kTileRows + threadIdx.x;
  uint32_t bits = 0;
  if (threadIdx.x < kTileRows && row < p.rows) {
#pragma unroll 4
    for (int64_t part = 0; part < p.row_parts; ++part) {
      bits = max(bits, __ldg(p.row_amax + part * p.rows + row));
    }
  }
  return bits;
}

template <typename T, typename Format, Granularity kGranularity, bool kData, bool kDataT>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kGranularity>)
    cast_kernel(const CastParams p) {
  constexpr bool kRowwise = kGranularity == Granularity::kRowwise;
  __shared__ alignas(16) uint32_t turned[kDataT ? kTileCols * kGroups : 1];
  __shared__ alignas(16) uint32_t scratch[kThreads];
  __shared__ float row_multiplier[kRowwise && kData ? kTileRows : 1];
  __shared__ float col_multiplier[kRowwise && kDataT ? kTileCols : 1];

  const int group = threadIdx.x / kColGroups;
  const int col_group = threadIdx.x % kColGroups;
  const int64_t tile_col = blockIdx.x;
  const int64_t strip = p.plan.strips - 1 - blockIdx.y;
  const int64_t col0 = tile_col * kTileCols;
  const int64_t col = col0 + col_group * 8;
  const int64_t tile_begin = strip * p.plan.tiles_per_block;
  const int64_t tile_end = min(tile_begin + p.plan.tiles_per_block, p.plan.row_tiles);

  const auto load_tile = [&](int64_t tile, Vec8<T>(&v)[kRowsPerThread]) {
    const int64_t row = tile * kTileRows + group * kRowsPerThread;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const T* source = static_cast<const T*>(p.x) + (row + r) * p.ld;
      v[r] = load8(source, col, row + r < p.rows ? p.cols : 0, p.vectorized);
    }
  };
  // The first tile is under way while the partial results are reduced.
  Vec8<T> v[kRowsPerThread];
  load_tile(tile_begin, v);

  [[maybe_unused]] uint32_t row_bits = 0;
  if constexpr (kRowwise && kData) row_bits = row_amax_bits(p, tile_begin);

  float m[8];
  if constexpr (!kRowwise) {
    const float multiplier = tensor_multiplier(p, Format::kMax, scratch);
#pragma unroll
    for (int j = 0; j < 8; ++j) m[j] = multiplier;
  }
  if constexpr (kRowwise && kDataT) {
    column_multipliers(p, col0, Format::kMax, strip == 0, scratch, col_multiplier);
  }
  if (p.column_sum != nullptr && strip == 0) {
    finish_column_sums(p, col0, reinterpret_cast<float*>(scratch));
  }

  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t tile_row = tile * kTileRows;
    if constexpr (kRowwise && kData) {
      __syncthreads();  // the previous tile's readers are done
      if (threadIdx.x < kTileRows) {
        const int64_t row = tile_row + threadIdx.x;
        const GroupScale row_group = scale_from_amax(row_bits, Format::kMax);
        row_multiplier[threadIdx.x] = row_group.quant_multiplier;
        if (tile_col == 0 && row < p.data.rows) p.scale[row] = row_group.scale;
      }
    }
    if constexpr (kRowwise || kDataT) __syncthreads();

    uint2 codes[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int64_t row = tile_row + group * kRowsPerThread + r;
      const int64_t valid = row < p.rows ? p.cols - col : 0;
      if constexpr (kRowwise && kData) {
        const float multiplier = row_multiplier[group * kRowsPerThread + r];
#pragma unroll
        for (int j = 0; j < 8; ++j) m[j] = multiplier;
      }
      if constexpr (kData || !kRowwise) codes[r] = keep_first(encode8<T, Format>(v[r], m), valid);
      if constexpr (kData) {
        if (row < p.data.rows && col < p.data.ld) {
          *reinterpret_cast<uint2*>(static_cast<uint8_t*>(p.data.data) + row * p.data.ld + col) =
              codes[r];
        }
      }
    }
    if constexpr (kRowwise && kDataT) {
#pragma unroll
      for (int j = 0; j < 8; ++j) m[j] = col_multiplier[col_group * 8 + j];
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        const int64_t row = tile_row + group * kRowsPerThread + r;
        const int64_t valid = row < p.rows ? p.cols - col : 0;
        codes[r] = keep_first(encode8<T, Format>(v[r], m), valid);
      }
    }
    if (tile + 1 < tile_end) {
      load_tile(tile + 1, v);
      if constexpr (kRowwise && kData) row_bits = row_amax_bits(p, tile + 1);
    }

    if constexpr (kDataT) {
      uint32_t words[8];
      transpose_bytes(codes[0].x, codes[1].x, codes[2].x, codes[3].x, words);
      transpose_bytes(codes[0].y, codes[1].y, codes[2].y, codes[3].y, words + 4);
      const int place = group ^ (4 * col_group);
#pragma unroll
      for (int j = 0; j < 8; ++j) turned[(col_group * 8 + j) * kGroups + place] = words[j];
      __syncthreads();
      // 64 columns of 128 codes: eight lanes write one column's 128 bytes, 16 bytes each.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = i * (kTileCols / 2) + static_cast<int>(threadIdx.x) / 8;
        const int chunk = static_cast<int>(threadIdx.x) % 8;
        const int64_t out_row = col0 + column;
        const int64_t out_col = tile_row + chunk * 16;
        if (out_row < p.data_t.rows && out_col < p.data_t.ld) {
          const uint4 q = *reinterpret_cast<const uint4*>(
              &turned[column * kGroups + 4 * (chunk ^ (column / 8))]);
          *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.data_t.data) + out_row * p.data_t.ld +
                                    out_col) = q;
        }
      }
    }
  }
}

template <typename T, typename Format, Granularity kGranularity>
void launch_typed(const CastParams& params, cudaStream_t stream) {
  const bool data = params.data.data != nullptr;
  const bool data_t = params.data_t.data != nullptr;
  const dim3 grid(static_cast<unsigned>(params.plan.col_tiles),
                  static_cast<unsigned>(params.plan.strips));
  if (data && data_t) {
    launch(cast_kernel<T, Format, kGranularity, true, true>, grid, kThreads, stream, params);
  } else if (data_t) {
    launch(cast_kernel<T, Format, kGranularity, false, true>, grid, kThreads, stream, params);
  } else if constexpr (kGranularity == Granularity::kTensorwise) {
    launch(cast_kernel<T, Format, kGranularity, true, false>, grid, kThreads, stream, params);
  }
}

}  // namespace

void launch_cast(const CastParams& params, Dtype x_dtype, Dtype dtype, Granularity granularity,
                 cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      using T = typename decltype(input)::type;
      using Format = typename decltype(format)::type;
      if (granularity == Granularity::kTensorwise) {
        launch_typed<T, Format, Granularity::kTensorwise>(params, stream);
      } else {
        launch_typed<T, Format, Granularity::kRowwise>(params, stream);
      }
    });
  });
}

}  // namespace fp8::core
