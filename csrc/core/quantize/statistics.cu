// The first pass over a matrix in memory: the kernel of statistics.cuh.
#include "core/quantize/statistics.cuh"

namespace fp8::core {
namespace {

template <int kWhat>
void launch_what(const StatisticsParams& params, Dtype x_dtype, cudaStream_t stream) {
  dispatch_input(x_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto cx = static_cast<unsigned>(params.plan.cluster_x);
    const auto cy = static_cast<unsigned>(params.plan.cluster_y);
    const dim3 grid(static_cast<unsigned>(round_up(params.plan.col_tiles, cx)),
                    static_cast<unsigned>(round_up(params.plan.row_chunks, cy)));
    const From<FoldedSource<T>, StatisticsParams> from{
        {{static_cast<const T*>(params.x), params.plan.rows, params.plan.cols, params.plan.ld,
          params.vectorized},
         params.plan.last_row_cols},
        params};
    launch(statistics_kernel<FoldedSource<T>, kWhat>, grid, kThreads, stream, from,
           {.cluster = dim3(cx, cy), .pdl = params.pdl});
  });
}

}  // namespace

void launch_statistics(const StatisticsParams& params, Dtype x_dtype, cudaStream_t stream) {
  const int what = (params.tensor_amax != nullptr ? kTensorAmax : 0) |
                   (params.row_amax != nullptr ? kRowAmax : 0) |
                   (params.col_amax != nullptr ? kColAmax : 0) |
                   (params.col_sum != nullptr ? kColSum : 0);
  switch (what) {
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
