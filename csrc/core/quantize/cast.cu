// The second pass over a matrix in memory: the kernel of cast.cuh.
#include "core/quantize/cast.cuh"

namespace fp8::core {
namespace {

template <typename T, typename Format, ScaleOf kScaleOf>
void launch_typed(const CastParams& params, cudaStream_t stream) {
  const bool data = params.data.data != nullptr;
  const bool data_t = params.data_t.data != nullptr;
  const auto grid = static_cast<unsigned>(params.plan.col_tiles * params.plan.strips);
  using Source = MatrixSource<T>;
  const From<Source, CastParams> from{matrix_source<T>(params), params};
  const auto go = [&](auto kernel) {
    launch(kernel, grid, kThreads, stream, from, {.pdl = params.pdl});
  };
  if (data && data_t) {
    go(cast_kernel<Source, Format, kScaleOf, true, true>);
  } else if (data_t) {
    go(cast_kernel<Source, Format, kScaleOf, false, true>);
  } else {
    go(cast_kernel<Source, Format, kScaleOf, true, false>);
  }
}

}  // namespace

void launch_cast(const CastParams& params, Dtype x_dtype, Dtype dtype, Granularity granularity,
                 cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      using T = typename decltype(input)::type;
      using Format = typename decltype(format)::type;
      if (granularity == Granularity::kRowwise) {
        launch_typed<T, Format, ScaleOf::kRowwise>(params, stream);
      } else if (params.static_scale == nullptr && params.tensor_amax == nullptr) {
        launch_typed<T, Format, ScaleOf::kDelayed>(params, stream);
      } else {
        launch_typed<T, Format, ScaleOf::kTensorwise>(params, stream);
      }
    });
  });
}

}  // namespace fp8::core
