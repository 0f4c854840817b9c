// What fused_linear refuses, for every device and for fake tensors alike.
#include "fp8/core.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/linear/linear.h"

namespace fp8 {

void check_linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  FP8_CHECK_HIGH_PRECISION("fused_linear", "x", x);
  FP8_CHECK_TYPE(weight.scalar_type() == x.scalar_type(),
                 "fp8::fused_linear: expected weight in x's dtype ", x.scalar_type(), ", got ",
                 weight.scalar_type());
  FP8_CHECK_VALUE(x.dim() >= 1,
                  "fp8::fused_linear: expected x of at least one dimension, got a scalar");
  FP8_CHECK_VALUE(weight.dim() == 2, "fp8::fused_linear: expected weight [N, K], got shape ",
                  weight.sym_sizes());
  FP8_CHECK_VALUE(x.sym_size(-1) == weight.sym_size(1),
                  "fp8::fused_linear: x and weight must share K, got x=", x.sym_sizes(),
                  ", weight=", weight.sym_sizes(), " (weight is [N, K])");
  FP8_CHECK_SAME_DEVICE("fused_linear", "weight", weight, "x", x);
  if (!bias) return;
  FP8_CHECK_TYPE(bias->scalar_type() == x.scalar_type(),
                 "fp8::fused_linear: expected bias in x's dtype ", x.scalar_type(), ", got ",
                 bias->scalar_type());
  FP8_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0),
                  "fp8::fused_linear: expected bias of shape [N] = [", weight.sym_size(0),
                  "], got ", bias->sym_sizes());
  FP8_CHECK_SAME_DEVICE("fused_linear", "bias", *bias, "x", x);
}

void check_input_scale(const at::Tensor& scale, const Recipe& recipe, const at::Tensor& x) {
  FP8_CHECK_VALUE(recipe.granularity == core::Granularity::kTensorwise,
                  "fp8::fused_linear: expected a recipe of one scale per tensor with input_scale, "
                  "got '",
                  recipe.name, "'");
  FP8_CHECK_TYPE(scale.scalar_type() == at::kFloat,
                 "fp8::fused_linear: expected input_scale in float32, got ", scale.scalar_type());
  FP8_CHECK_VALUE(scale.sym_numel() == 1,
                  "fp8::fused_linear: expected input_scale of one element, got shape ",
                  scale.sym_sizes());
  FP8_CHECK_SAME_DEVICE("fused_linear", "input_scale", scale, "x", x);
}

void check_history(const at::Tensor& history, const Recipe& recipe, const at::Tensor& x) {
  FP8_CHECK_VALUE(recipe.delayed,
                  "fp8::fused_linear: expected the recipe 'delayed' with a history, got '",
                  recipe.name, "'");
  FP8_CHECK_TYPE(history.scalar_type() == at::kInt,
                 "fp8::fused_linear: expected history in int32, as make_history gives it, got ",
                 history.scalar_type());
  FP8_CHECK_VALUE(history.dim() == 2 && history.sym_size(0) == 3 &&
                      history.sym_size(1) == core::kAmaxHistorySize && history.is_contiguous(),
                  "fp8::fused_linear: expected history contiguous, of shape [3, ",
                  core::kAmaxHistorySize, "], as make_history gives it, got shape ",
                  history.sym_sizes(), ", strides ", history.sym_strides());
  FP8_CHECK_SAME_DEVICE("fused_linear", "history", history, "x", x);
}

}  // namespace fp8
