// The end of a delayed quantization of a matrix in memory: the kernel of settle_delayed.cuh.
#include "core/quantize/settle_delayed.cuh"

namespace fp8::core {

void launch_settle_delayed(const CastParams& params, unsigned blocks, Dtype x_dtype, Dtype dtype,
                           cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      using T = typename decltype(input)::type;
      using Format = typename decltype(format)::type;
      launch_settle_of<Format>(matrix_source<T>(params), params, blocks, stream);
    });
  });
}

}  // namespace fp8::core
