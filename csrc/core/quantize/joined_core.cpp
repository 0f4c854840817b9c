// core::quantize_joined: the passes of core::quantize, over sources that read several tensors.
#include <limits>

#include "core/device/device.h"
#include "core/quantize/joined_launchers.h"
#include "host/formats.h"

namespace fp8::core {
namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

class JoinedPasses : public QuantizePasses {
 public:
  explicit JoinedPasses(const JoinedArgs& args) : args_(args) {}

  void statistics(const StatisticsParams& params, cudaStream_t stream) const override {
    launch_joined_statistics(args_, params, stream);
  }
  void cast(const CastParams& params, Dtype /*dtype*/, Granularity /*granularity*/,
            cudaStream_t stream) const override {
    launch_joined_cast(args_, params, stream);
  }
  void settle_delayed(const CastParams& params, unsigned blocks, Dtype /*dtype*/,
                      cudaStream_t stream) const override {
    launch_joined_settle(args_, params, blocks, stream);
  }
  void rowwise(const RowwiseParams& params, Dtype /*dtype*/, cudaStream_t stream) const override {
    launch_joined_rowwise(args_, params, stream);
  }
  void blockwise(const BlockwiseParams& params, Dtype /*dtype*/, Granularity /*granularity*/,
                 cudaStream_t stream) const override {
    launch_joined_blockwise(args_, params, stream);
  }

 private:
  const JoinedArgs& args_;
};

// As a producer's: see quantize_with.
QuantizeArgs whole(const JoinedArgs& args) {
  QuantizeArgs all = args.quantize;
  all.x = nullptr;
  all.ld = -1;
  all.whole_gpu = false;
  return all;
}

// What the kernels were made for: weights in e4m3 one below the other, gradients side by side.
bool has_kernels(const JoinedArgs& args) {
  const QuantizeArgs& q = args.quantize;
  const bool tensorwise = q.granularity == Granularity::kTensorwise;
  const Dtype format = tensorwise && args.side_by_side ? Dtype::kE5M2 : Dtype::kE4M3;
  const Granularity blocks =
      args.side_by_side ? Granularity::kBlock1x128 : Granularity::kBlock128x128;
  return q.dtype == format && (!is_blockwise(q.granularity) || q.granularity == blocks) &&
         (args.side_by_side || q.column_sum == nullptr);
}

}  // namespace

bool suits_joined(const JoinedArgs& args) {
  const QuantizeArgs& q = args.quantize;
  if (args.count < 1 || args.count > kMaxJoinedParts || q.column_amax != nullptr) return false;
  if (q.x_dtype != Dtype::kBFloat16 && q.x_dtype != Dtype::kFloat16) return false;
  int64_t total = 0;
  for (int i = 0; i < args.count; ++i) {
    const JoinedPart& part = args.parts[i];
    const bool aligned = reinterpret_cast<uintptr_t>(part.x) % 16 == 0 && part.ld % 8 == 0;
    if (!aligned || part.extent <= 0 || part.ld > kMaxIndex) return false;
    if (args.side_by_side && part.extent % 8 != 0) return false;
    total += part.extent;
  }
  return total <= kMaxIndex && total == (args.side_by_side ? q.cols : q.rows) && has_kernels(args);
}

size_t quantize_joined_workspace_bytes(const JoinedArgs& args) {
  return quantize_workspace_bytes(whole(args));
}

void quantize_joined(const JoinedArgs& args, Stream stream) {
  require(suits_joined(args), "quantize_joined expects parts that suits_joined takes");
  quantize_with(JoinedPasses(args), whole(args), stream);
}

}  // namespace fp8::core
