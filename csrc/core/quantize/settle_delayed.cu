// The end of a delayed quantization of a matrix in memory: the kernel of settle_delayed.cuh.
#include "core/quantize/settle_delayed.cuh"

namespace fp8::core {

void launch_settle_delayed(const CastParams& params, unsigned blocks, Dtype x_dtype, Dtype dtype,
                           cudaStream_t stream) {
  const bool data = params.data.data != nullptr;
  const bool data_t = params.data_t.data != nullptr;
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      using T = typename decltype(input)::type;
      using Format = typename decltype(format)::type;
      using Source = MatrixSource<T>;
      const From<Source, CastParams> from{matrix_source<T>(params), params};
      const auto go = [&](auto kernel) {
        launch(kernel, blocks, kThreads, stream, from, {.pdl = params.pdl});
      };
      if (data && data_t) {
        go(settle_delayed_kernel<Source, Format, true, true>);
      } else if (data_t) {
        go(settle_delayed_kernel<Source, Format, false, true>);
      } else {
        go(settle_delayed_kernel<Source, Format, true, false>);
      }
    });
  });
}

}  // namespace fp8::core
