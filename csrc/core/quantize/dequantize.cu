// data * scale, elementwise, from any strides of data and scale to a contiguous matrix.
//
// Rows of whole 8-byte groups with one scale each, the usual case, go eight elements a thread;
// anything else goes one element a thread. Bound by bandwidth: 1 + 2 bytes an element (bf16).
#include "core/device/dispatch.cuh"
#include "core/quantize/kernels.h"

namespace fp8::core {
namespace {

template <typename Format>
__device__ __forceinline__ float decode_on_device(uint8_t code) {
  constexpr auto kInterpretation = std::is_same_v<Format, E4M3> ? __NV_E4M3 : __NV_E5M2;
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, kInterpretation)));
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

template <typename T, typename Format>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeArgs p) {
  const int64_t count = p.rows * p.cols;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / p.cols;
    const int64_t col = i % p.cols;
    const uint8_t code =
        static_cast<const uint8_t*>(p.data)[row * p.row_stride + col * p.col_stride];
    const float scale = p.scale[row / p.scale_block_rows * p.scale_row_stride +
                                col / p.scale_block_cols * p.scale_col_stride];
    static_cast<T*>(p.out)[i] = from_float<T>(decode_on_device<Format>(code) * scale);
  }
}

// Groups of eight codes of one row, kInFlight of them a thread and kThreads apart, so that the
// loads of all are on their way together. Rows of data start on 8 bytes, rows of out on 16. Index:
// of the groups; 64 bits only where it must be, for its divisions.
constexpr int kInFlight = 4;

template <typename T, typename Format, typename Index>
__global__ void __launch_bounds__(kThreads) dequantize_rows_kernel(const DequantizeArgs p) {
  const auto cols = static_cast<Index>(p.cols / 8);
  const auto count = static_cast<Index>(p.rows * (p.cols / 8));
  const auto scale_rows = static_cast<Index>(p.scale_block_rows);
  const auto scale_cols = static_cast<Index>(p.scale_block_cols);
  const Index first = static_cast<Index>(blockIdx.x) * (kThreads * kInFlight) + threadIdx.x;
  uint2 codes[kInFlight];
  float scale[kInFlight];
  int64_t place[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const Index group = first + i * kThreads;
    if (group >= count) break;
    const Index row = group / cols;
    const Index col = (group - row * cols) * 8;
    codes[i] = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p.data) +
                                                    row * p.row_stride + col));
    scale[i] = __ldg(p.scale + row / scale_rows * p.scale_row_stride +
                     col / scale_cols * p.scale_col_stride);
    place[i] = row * p.cols + col;
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (first + i * kThreads >= count) break;
    alignas(16) T values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t word = j < 4 ? codes[i].x : codes[i].y;
      const auto code = static_cast<uint8_t>(word >> (8 * (j % 4)));
      values[j] = from_float<T>(decode_on_device<Format>(code) * scale[i]);
    }
    auto* out = reinterpret_cast<uint4*>(static_cast<T*>(p.out) + place[i]);
#pragma unroll
    for (int j = 0; j < static_cast<int>(sizeof(values) / 16); ++j) {
      out[j] = reinterpret_cast<const uint4*>(values)[j];
    }
  }
}

}  // namespace

void dequantize(const DequantizeArgs& args, Stream stream) {
  require(args.rows > 0 && args.cols > 0, "dequantize expects a matrix that is not empty");
  dispatch_input(args.out_dtype, [&](auto output) {
    dispatch_format(args.dtype, [&](auto format) {
      using T = typename decltype(output)::type;
      using Format = typename decltype(format)::type;
      const bool by_rows = args.col_stride == 1 &&
                           (args.scale_col_stride == 0 || args.scale_block_cols % 8 == 0) &&
                           args.cols % 8 == 0 && args.row_stride % 8 == 0 &&
                           reinterpret_cast<uintptr_t>(args.data) % 8 == 0 &&
                           reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
      const int64_t count = args.rows * args.cols;
      if (!by_rows) {
        const auto blocks =
            static_cast<unsigned>(std::min<int64_t>(ceil_div(count, kThreads), 65536 * 16));
        return launch(dequantize_kernel<T, Format>, blocks, kThreads, stream, args);
      }
      const int64_t blocks = ceil_div(count, int64_t{8} * kThreads * kInFlight);
      require(blocks <= kMaxGridX, "dequantize expects fewer than 2^44 elements");
      // Every divisor and every index within 32 bits, with room for the last block's overhang
      const int64_t largest = std::max({count, args.scale_block_rows, args.scale_block_cols});
      launch(largest < int64_t{1} << 31 ? dequantize_rows_kernel<T, Format, uint32_t>
                                        : dequantize_rows_kernel<T, Format, int64_t>,
             static_cast<unsigned>(blocks), kThreads, stream, args);
    });
  });
}

}  // namespace fp8::core
