// The second pass over a matrix in several tensors, and what follows a delayed one: the kernels of
// cast.cuh and settle_delayed.cuh.
#include "core/quantize/cast.cuh"
#include "core/quantize/joined.cuh"
#include "core/quantize/joined_launchers.h"
#include "core/quantize/settle_delayed.cuh"

namespace fp8::core {

void launch_joined_cast(const JoinedArgs& args, const CastParams& params, cudaStream_t stream) {
  const ScaleOf scale = scale_of(params, args.quantize.granularity);
  with_joined_source(args, [&](auto source) {
    using Format = typename decltype(source)::TensorFormat;
    switch (scale) {
      case ScaleOf::kRowwise:
        return launch_cast_of<E4M3, ScaleOf::kRowwise>(source, params, stream);
      case ScaleOf::kDelayed:
        return launch_cast_of<Format, ScaleOf::kDelayed>(source, params, stream);
      default:
        return launch_cast_of<Format, ScaleOf::kTensorwise>(source, params, stream);
    }
  });
}

void launch_joined_settle(const JoinedArgs& args, const CastParams& params, unsigned blocks,
                          cudaStream_t stream) {
  with_joined_source(args, [&](auto source) {
    launch_settle_of<typename decltype(source)::TensorFormat>(source, params, blocks, stream);
  });
}

}  // namespace fp8::core
