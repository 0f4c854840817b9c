// fp8::nn::Linear (fp8/nn.h). Parameters are made and filled as in torch::nn::Linear, in the same
// order of random numbers.
#include <torch/nn/init.h>

#include <cmath>

#include "fp8/nn.h"
#include "fp8/ops.h"
#include "torch/common/messages.h"
#include "torch/common/recipe.h"

namespace fp8::nn {

LinearOptions::LinearOptions(int64_t in_features, int64_t out_features)
    : in_features_(in_features), out_features_(out_features) {}

LinearImpl::LinearImpl(int64_t in_features, int64_t out_features)
    : LinearImpl(LinearOptions(in_features, out_features)) {}

LinearImpl::LinearImpl(const LinearOptions& options_) : options(options_) {
  recipe_id(options.recipe());
  LinearImpl::reset();
}

void LinearImpl::reset() {
  weight =
      register_parameter("weight", torch::empty({options.out_features(), options.in_features()}));
  bias = options.bias() ? register_parameter("bias", torch::empty({options.out_features()}))
                        : register_parameter("bias", {}, /*requires_grad=*/false);
  // A copy of a layer that has one; clone() fills it.
  if (input_scale.defined()) {
    input_scale = register_buffer("input_scale", torch::empty_like(input_scale));
  }
  history = torch::Tensor();
  reset_parameters();
}

void LinearImpl::set_input_scale(const torch::Tensor& scale) {
  const Recipe& recipe = recipe_at(recipe_id(options.recipe()));
  FP8_CHECK_VALUE(recipe.granularity == core::Granularity::kTensorwise,
                  "fp8::nn::Linear: expected a recipe of one scale per tensor with an input "
                  "scale, got '",
                  recipe.name, "'");
  FP8_CHECK_VALUE(scale.defined() && scale.scalar_type() == at::kFloat && scale.numel() == 1,
                  "fp8::nn::Linear: expected an input scale of one float32 element");
  const torch::Tensor copy = scale.detach().reshape({}).to(weight.device()).clone();
  if (input_scale.defined()) {
    input_scale.set_data(copy);
  } else {
    input_scale = register_buffer("input_scale", copy);
  }
}

void LinearImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  const torch::Tensor scale = input_scale.defined() ? input_scale.detach() : input_scale;
  torch::nn::Module::to(device, dtype, non_blocking);
  keep_float32(scale);
  move_history(device, non_blocking);
}

void LinearImpl::to(torch::Dtype dtype, bool non_blocking) {
  const torch::Tensor scale = input_scale.defined() ? input_scale.detach() : input_scale;
  torch::nn::Module::to(dtype, non_blocking);
  keep_float32(scale);
}

void LinearImpl::to(torch::Device device, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
  move_history(device, non_blocking);
}

void LinearImpl::move_history(torch::Device device, bool non_blocking) {
  if (history.defined()) history = history.to(device, non_blocking);
}

void LinearImpl::keep_float32(const torch::Tensor& scale) {
  if (scale.defined()) input_scale.set_data(scale.to(input_scale.device()));
}

void LinearImpl::reset_parameters() {
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
  if (!bias.defined()) return;
  const double bound = 1 / std::sqrt(static_cast<double>(options.in_features()));
  torch::nn::init::uniform_(bias, -bound, bound);
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "fp8::nn::Linear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features()
         << ", bias=" << (options.bias() ? "true" : "false") << ", recipe=" << options.recipe()
         << (input_scale.defined() ? ", input_scale=static)" : ")");
}

std::optional<torch::Tensor> LinearImpl::current_history() {
  if (!recipe_at(recipe_id(options.recipe())).delayed) return std::nullopt;
  if (!history.defined() || history.device() != weight.device()) {
    history = make_history(weight.device());
  }
  return history;
}

torch::Tensor LinearImpl::forward(const torch::Tensor& input) {
  return fused_linear(
      input, weight, bias.defined() ? std::optional(bias) : std::nullopt, options.recipe(),
      input_scale.defined() ? std::optional(input_scale) : std::nullopt, current_history());
}

}  // namespace fp8::nn
