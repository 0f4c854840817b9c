// data * scale, elementwise, from any strides of data and scale to a contiguous matrix. Not on a hot path: it
// serves inspection and the matmul's fallback, so it is written for its generality.
#include "quantize/dispatch.cuh"
#include "quantize/kernels.h"

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
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t row = i / p.cols;
    const int64_t col = i % p.cols;
    const uint8_t code =
        static_cast<const uint8_t*>(p.data)[row * p.row_stride + col * p.col_stride];
    const float scale = p.scale[row * p.scale_row_stride + col * p.scale_col_stride];
    static_cast<T*>(p.out)[i] = from_float<T>(decode_on_device<Format>(code) * scale);
  }
}

}  // namespace

void dequantize(const DequantizeArgs& args, Stream stream) {
  require(args.rows > 0 && args.cols > 0, "dequantize expects a matrix that is not empty");
  dispatch_input(args.out_dtype, [&](auto output) {
    dispatch_format(args.dtype, [&](auto format) {
      using T = typename decltype(output)::type;
      using Format = typename decltype(format)::type;
      const auto blocks =
          static_cast<unsigned>(std::min<int64_t>(ceil_div(args.rows * args.cols, kThreads), 65536));
      launch(dequantize_kernel<T, Format>, blocks, kThreads, stream, args);
    });
  });
}

}  // namespace fp8::core
