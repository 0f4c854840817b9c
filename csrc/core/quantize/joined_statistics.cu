// The first pass over a matrix in several tensors: the kernel of statistics.cuh.
#include "core/quantize/joined.cuh"
#include "core/quantize/joined_launchers.h"
#include "core/quantize/statistics.cuh"

namespace fp8::core {

// Sums of columns are those of gradients, which lie side by side.
void launch_joined_statistics(const JoinedArgs& args, const StatisticsParams& params,
                              cudaStream_t stream) {
  const int what = statistics_of(params);
  with_joined_source(args, [&](auto source) {
    switch (what) {
      case kTensorAmax:
        return launch_statistics_of<kTensorAmax>(source, params, stream);
      case kColAmax:
        return launch_statistics_of<kColAmax>(source, params, stream);
      case kRowAmax | kColAmax:
        return launch_statistics_of<kRowAmax | kColAmax>(source, params, stream);
      default:
        break;
    }
    if constexpr (decltype(source)::kBlocks == Granularity::kBlock1x128) {
      switch (what) {
        case kTensorAmax | kColSum:
          return launch_statistics_of<kTensorAmax | kColSum>(source, params, stream);
        case kColAmax | kColSum:
          return launch_statistics_of<kColAmax | kColSum>(source, params, stream);
        case kRowAmax | kColSum:
          return launch_statistics_of<kRowAmax | kColSum>(source, params, stream);
        case kRowAmax | kColAmax | kColSum:
          return launch_statistics_of<kRowAmax | kColAmax | kColSum>(source, params, stream);
        default:
          break;
      }
    }
    throw Error("fp8: quantize_joined has no statistics pass for this combination");
  });
}

}  // namespace fp8::core
