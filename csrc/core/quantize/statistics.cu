// The first pass over a matrix in memory: the kernel of statistics.cuh.
#include "core/quantize/statistics.cuh"

namespace fp8::core {
namespace {

template <int kWhat>
void launch_what(const StatisticsParams& params, Dtype x_dtype, cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const FoldedSource<T> source{{static_cast<const T*>(params.x), params.plan.rows,
                                  params.plan.cols, params.plan.ld, params.vectorized},
                                 params.plan.last_row_cols};
    launch_statistics_of<kWhat>(source, params, stream);
  });
}

}  // namespace

void launch_statistics(const StatisticsParams& params, Dtype x_dtype, cudaStream_t stream) {
  switch (statistics_of(params)) {
    case kTensorAmax:
      return launch_what<kTensorAmax>(params, x_dtype, stream);
    case kTensorAmax | kColSum:
      return launch_what<kTensorAmax | kColSum>(params, x_dtype, stream);
    case kColAmax:
      return launch_what<kColAmax>(params, x_dtype, stream);
    case kColAmax | kColSum:
      return launch_what<kColAmax | kColSum>(params, x_dtype, stream);
    case kRowAmax | kColSum:
      return launch_what<kRowAmax | kColSum>(params, x_dtype, stream);
    case kRowAmax | kColAmax:
      return launch_what<kRowAmax | kColAmax>(params, x_dtype, stream);
    case kRowAmax | kColAmax | kColSum:
      return launch_what<kRowAmax | kColAmax | kColSum>(params, x_dtype, stream);
    default:
      throw Error("fp8: quantize has no statistics pass for this combination");
  }
}

}  // namespace fp8::core
