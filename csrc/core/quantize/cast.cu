// The second pass over a matrix in memory: the kernel of cast.cuh.
#include "core/quantize/cast.cuh"

namespace fp8::core {

void launch_cast(const CastParams& params, Dtype x_dtype, Dtype dtype, Granularity granularity,
                 cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      using T = typename decltype(input)::type;
      using Format = typename decltype(format)::type;
      const auto source = matrix_source<T>(params);
      switch (scale_of(params, granularity)) {
        case ScaleOf::kRowwise:
          return launch_cast_of<Format, ScaleOf::kRowwise>(source, params, stream);
        case ScaleOf::kDelayed:
          return launch_cast_of<Format, ScaleOf::kDelayed>(source, params, stream);
        default:
          return launch_cast_of<Format, ScaleOf::kTensorwise>(source, params, stream);
      }
    });
  });
}

}  // namespace fp8::core
