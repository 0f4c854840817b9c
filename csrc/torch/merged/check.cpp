// What merged_linear refuses, for every device and for fake tensors alike.
#include <algorithm>

#include "fp8/core.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/linear/linear.h"
#include "torch/merged/merged.h"
#include "torch/merged/shared.h"

namespace fp8 {
namespace {

void check_weight(size_t i, const at::Tensor& weight, const at::Tensor& x) {
  FP8_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "fp8::merged_linear: expected weight ", i,
                 " in x's dtype ", x.scalar_type(), ", got ", weight.scalar_type());
  FP8_CHECK_VALUE(weight.dim() == 2, "fp8::merged_linear: expected weight ", i,
                  " [N, K], got shape ", weight.sym_sizes());
  FP8_CHECK_VALUE(x.sym_size(-1) == weight.sym_size(1), "fp8::merged_linear: x and weight ", i,
                  " must share K, got x=", x.sym_sizes(), ", weight=", weight.sym_sizes(),
                  " (weight is [N, K])");
  FP8_CHECK_SAME_DEVICE("merged_linear", "a weight", weight, "x", x);
}

void check_bias(size_t i, const at::Tensor& bias, const at::Tensor& weight, const at::Tensor& x) {
  FP8_CHECK_TYPE(bias.scalar_type() == x.scalar_type(), "fp8::merged_linear: expected bias ", i,
                 " in x's dtype ", x.scalar_type(), ", got ", bias.scalar_type());
  FP8_CHECK_VALUE(bias.dim() == 1 && bias.sym_size(0) == weight.sym_size(0),
                  "fp8::merged_linear: expected bias ", i, " of shape [N] = [", weight.sym_size(0),
                  "], got ", bias.sym_sizes());
  FP8_CHECK_SAME_DEVICE("merged_linear", "a bias", bias, "x", x);
}

}  // namespace

void check_merged(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                  int64_t recipe, const std::optional<at::Tensor>& history) {
  FP8_CHECK_HIGH_PRECISION("merged_linear", "x", x);
  FP8_CHECK_VALUE(x.dim() >= 1,
                  "fp8::merged_linear: expected x of at least one dimension, got a scalar");
  FP8_CHECK_VALUE(!weights.empty() && weights.size() <= merged::kMaxParts,
                  "fp8::merged_linear: expected 1 to ", merged::kMaxParts, " weights, got ",
                  weights.size());
  FP8_CHECK_VALUE(!biases || biases->size() == weights.size(),
                  "fp8::merged_linear: expected a bias or None for each of ", weights.size(),
                  " weights, got ", biases ? biases->size() : 0);
  for (size_t i = 0; i < weights.size(); ++i) {
    check_weight(i, weights[i], x);
    const std::optional<at::Tensor> bias = merged::bias_of(biases, i);
    if (bias) check_bias(i, *bias, weights[i], x);
  }
  if (history) check_history(*history, recipe_at(recipe), x);
}

void merged::check_forward(const at::Tensor& x, at::TensorList weights,
                           const std::optional<at::Tensor>& bias, int64_t recipe,
                           const std::optional<at::Tensor>& history) {
  check_merged(x, weights, std::nullopt, recipe, history);
  FP8_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->sym_size(0) == sum_of(weights, 0)),
                  "fp8::_merged_forward: expected bias of shape [", sum_of(weights, 0), "], got ",
                  bias ? bias->sym_sizes() : c10::SymIntArrayRef());
}

void merged::check_backward(at::TensorList dys, at::TensorList weights,
                            const c10::SymInt& in_features, bool needs_dx, int64_t recipe,
                            const std::optional<at::Tensor>& history) {
  FP8_CHECK_VALUE(!dys.empty(), "fp8::_merged_backward: expected a gradient, got none");
  FP8_CHECK_VALUE(weights.empty() ? !needs_dx : weights.size() == dys.size(),
                  "fp8::_merged_backward: expected a weight for each of ", dys.size(),
                  " gradients, got ", weights.size());
  const auto leading = [](const at::Tensor& dy) {
    return dy.sym_sizes().slice(0, std::max<int64_t>(dy.dim() - 1, 0));
  };
  for (size_t i = 0; i < dys.size(); ++i) {
    const at::Tensor& dy = dys[i];
    FP8_CHECK_VALUE(dy.dim() >= 1 && leading(dy) == leading(dys.front()),
                    "fp8::_merged_backward: expected gradients of one leading shape, got ",
                    dys.front().sym_sizes(), " and ", dy.sym_sizes());
    if (weights.empty()) continue;
    const at::Tensor& weight = weights[i];
    FP8_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(0) == dy.sym_size(-1) &&
                        weight.sym_size(1) == in_features,
                    "fp8::_merged_backward: expected weight ", i, " of shape [", dy.sym_size(-1),
                    ", ", in_features, "], got ", weight.sym_sizes());
  }
  if (history) check_history(*history, recipe_at(recipe), dys.front());
}

}  // namespace fp8
