// What linear_frozen refuses, and how it reads the shape of a scale.
#include "torch/common/tensors.h"
#include "torch/frozen/frozen.h"

namespace fp8::frozen {
namespace {

using core::Granularity;

constexpr const char* kOp = "linear_frozen";

c10::SymInt blocks(const c10::SymInt& extent) {
  return (extent + (core::kScaleBlock - 1)) / core::kScaleBlock;
}

void check_scalar(const char* name, const at::Tensor& scale, const at::Tensor& x) {
  FP8_CHECK_TYPE(scale.scalar_type() == at::kFloat, "fp8::", kOp, ": expected ", name,
                 " in float32, got ", scale.scalar_type());
  FP8_CHECK_VALUE(scale.sym_numel() == 1, "fp8::", kOp, ": expected ", name,
                  " of one element, got shape ", scale.sym_sizes());
  FP8_CHECK_SAME_DEVICE(kOp, name, scale, "x", x);
}

Granularity input_of(Granularity weight, const OptionalTensor& input_scale,
                     std::optional<std::string_view> name) {
  const bool blocks = weight == Granularity::kBlock128x128;
  if (input_scale) {
    FP8_CHECK_VALUE(!blocks, "fp8::", kOp,
                    ": expected no input_scale with a weight of 128x128 blocks, whose product "
                    "takes x in blocks of 1x128, got one");
    FP8_CHECK_VALUE(!name || *name == "tensorwise", "fp8::", kOp,
                    ": expected input_granularity None or 'tensorwise' with input_scale, got '",
                    *name, "'");
    return Granularity::kTensorwise;
  }
  if (!name) return blocks ? Granularity::kBlock1x128 : Granularity::kRowwise;
  FP8_CHECK_VALUE(*name == "tensorwise" || *name == "rowwise" || *name == "blockwise", "fp8::", kOp,
                  ": expected input_granularity None, 'tensorwise', 'rowwise' or ",
                  "'blockwise', got '", *name, "'");
  FP8_CHECK_VALUE(blocks == (*name == "blockwise"), "fp8::", kOp,
                  ": expected input_granularity 'blockwise' with a weight of 128x128 blocks and "
                  "'tensorwise' or 'rowwise' with others, got '",
                  *name, "'");
  if (blocks) return Granularity::kBlock1x128;
  return *name == "tensorwise" ? Granularity::kTensorwise : Granularity::kRowwise;
}

}  // namespace

Granularity weight_granularity(const char* op, const at::Tensor& weight, const at::Tensor& scale,
                               std::optional<bool> is_blocks) {
  FP8_CHECK_TYPE(weight.scalar_type() == at::kFloat8_e4m3fn, "fp8::", op,
                 ": expected weight in float8_e4m3fn, got ", weight.scalar_type());
  FP8_CHECK_VALUE(weight.dim() == 2, "fp8::", op, ": expected weight [N, K], got shape ",
                  weight.sym_sizes());
  FP8_CHECK_TYPE(scale.scalar_type() == at::kFloat, "fp8::", op,
                 ": expected weight_scale in float32, got ", scale.scalar_type());
  FP8_CHECK_SAME_DEVICE(op, "weight_scale", scale, "weight", weight);
  const c10::SymInt features = weight.sym_size(0);
  const bool matrix = scale.dim() == 2;
  const bool grid = matrix && scale.sym_size(0) == blocks(features) &&
                    scale.sym_size(1) == blocks(weight.sym_size(1));
  if (grid && is_blocks.value_or(false)) return Granularity::kBlock128x128;
  if (scale.sym_numel() == 1) return Granularity::kTensorwise;
  if (scale.dim() == 1 && scale.sym_size(0) == features) return Granularity::kRowwise;
  if (matrix && scale.sym_size(0) == features && scale.sym_size(1) == 1) {
    return Granularity::kRowwise;
  }
  const bool row = matrix && scale.sym_size(0) == 1 && scale.sym_size(1) == features;
  if (row && !is_blocks.value_or(true)) return Granularity::kRowwise;
  if (grid) return Granularity::kBlock128x128;
  if (row) return Granularity::kRowwise;
  FP8_CHECK_VALUE(false, "fp8::", op, ": expected weight_scale of one element, of ", features,
                  " (a scale for each row), or of shape [", blocks(features), ", ",
                  blocks(weight.sym_size(1)), "] (one for each 128x128 block) for weight ",
                  weight.sym_sizes(), ", got shape ", scale.sym_sizes());
}

Form checked_form(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                  const OptionalTensor& bias, const OptionalTensor& input_scale,
                  std::optional<std::string_view> input_granularity) {
  FP8_CHECK_HIGH_PRECISION(kOp, "x", x);
  FP8_CHECK_VALUE(x.dim() >= 1, "fp8::", kOp,
                  ": expected x of at least one dimension, got a scalar");
  std::optional<bool> blocks;
  if (input_granularity) blocks = *input_granularity == "blockwise";
  const Granularity of_weight = weight_granularity(kOp, weight, weight_scale, blocks);
  FP8_CHECK_VALUE(x.sym_size(-1) == weight.sym_size(1), "fp8::", kOp,
                  ": x and weight must share K, got x=", x.sym_sizes(),
                  ", weight=", weight.sym_sizes(), " (weight is [N, K])");
  FP8_CHECK_SAME_DEVICE(kOp, "weight", weight, "x", x);
  if (input_scale) check_scalar("input_scale", *input_scale, x);
  if (bias) {
    FP8_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), "fp8::", kOp,
                   ": expected bias in x's dtype ", x.scalar_type(), ", got ", bias->scalar_type());
    FP8_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), "fp8::", kOp,
                    ": expected bias of shape [N] = [", weight.sym_size(0), "], got ",
                    bias->sym_sizes());
    FP8_CHECK_SAME_DEVICE(kOp, "bias", *bias, "x", x);
  }
  return {of_weight, input_of(of_weight, input_scale, input_granularity)};
}

}  // namespace fp8::frozen
