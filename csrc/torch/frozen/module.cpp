// fp8::nn::FrozenLinear and fp8::nn::freeze (fp8/nn.h).
#include <ATen/ATen.h>

#include "fp8/nn.h"
#include "fp8/ops.h"
#include "host/launch.h"
#include "torch/common/messages.h"
#include "torch/common/recipe.h"

namespace fp8::nn {
namespace {

using core::Granularity;

Recipe recipe_of(const FrozenLinearOptions& options) {
  return recipe_at(recipe_id(options.recipe()));
}

std::string_view input_granularity(const Recipe& recipe) {
  if (recipe.granularity == Granularity::kTensorwise) return "tensorwise";
  return recipe.granularity == Granularity::kRowwise ? "rowwise" : "blockwise";
}

std::vector<int64_t> scale_shape(const FrozenLinearOptions& options) {
  switch (recipe_of(options).weight_granularity) {
    case Granularity::kTensorwise:
      return {};
    case Granularity::kRowwise:
      return {options.out_features(), 1};
    default:
      return {core::blocks_of(options.out_features()), core::blocks_of(options.in_features())};
  }
}

}  // namespace

FrozenLinearOptions::FrozenLinearOptions(int64_t in_features, int64_t out_features)
    : in_features_(in_features), out_features_(out_features) {}

FrozenLinearImpl::FrozenLinearImpl(int64_t in_features, int64_t out_features)
    : FrozenLinearImpl(FrozenLinearOptions(in_features, out_features)) {}

FrozenLinearImpl::FrozenLinearImpl(const FrozenLinearOptions& options_) : options(options_) {
  const Recipe recipe = recipe_of(options);
  FP8_CHECK_VALUE(!options.static_input() || recipe.granularity == Granularity::kTensorwise,
                  "fp8::nn::FrozenLinear: expected a recipe of one scale per tensor with a static "
                  "input, got '",
                  recipe.name, "'");
  FrozenLinearImpl::reset();
}

void FrozenLinearImpl::reset() {
  const std::vector<int64_t> shape{options.out_features(), options.in_features()};
  weight = register_buffer("weight", torch::zeros(shape, torch::kByte).view(torch::kFloat8_e4m3fn));
  weight_scale = register_buffer("weight_scale", torch::ones(scale_shape(options), torch::kFloat));
  bias = options.bias() ? register_parameter("bias", torch::zeros({options.out_features()}))
                        : register_parameter("bias", {}, /*requires_grad=*/false);
  if (options.static_input()) {
    input_scale = register_buffer("input_scale", torch::ones({}, torch::kFloat));
  }
}

void FrozenLinearImpl::pretty_print(std::ostream& stream) const {
  stream << "fp8::nn::FrozenLinear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features()
         << ", bias=" << (options.bias() ? "true" : "false") << ", recipe=" << options.recipe()
         << (options.static_input() ? ", input_scale=static)" : ")");
}

void FrozenLinearImpl::to_all(std::optional<torch::Device> device,
                              std::optional<torch::Dtype> dtype, bool non_blocking) {
  const torch::NoGradGuard no_grad;
  for (torch::Tensor* t : {&weight, &weight_scale, &input_scale}) {
    if (t->defined() && device) t->set_data(t->to(*device, non_blocking));
  }
  if (!bias.defined()) return;
  const auto options = bias.options().device(device.value_or(bias.device()));
  bias.set_data(bias.to(dtype ? options.dtype(*dtype) : options, non_blocking));
}

void FrozenLinearImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  to_all(device, dtype, non_blocking);
}

void FrozenLinearImpl::to(torch::Dtype dtype, bool non_blocking) {
  to_all(std::nullopt, dtype, non_blocking);
}

void FrozenLinearImpl::to(torch::Device device, bool non_blocking) {
  to_all(device, std::nullopt, non_blocking);
}

torch::Tensor FrozenLinearImpl::forward(const torch::Tensor& input) {
  const Recipe recipe = recipe_of(options);
  return linear_frozen(input, weight, weight_scale,
                       bias.defined() ? std::optional(bias) : std::nullopt,
                       input_scale.defined() ? std::optional(input_scale) : std::nullopt,
                       input_granularity(recipe), recipe.power_of_two, options.decode());
}

FrozenLinear freeze(const Linear& layer) {
  const torch::NoGradGuard no_grad;
  FrozenLinear frozen(
      FrozenLinearOptions(layer->options.in_features(), layer->options.out_features())
          .bias(layer->bias.defined())
          .recipe(layer->options.recipe())
          .static_input(layer->input_scale.defined())
          .decode(false));  // the layer's bits, of few rows too
  const Recipe recipe = recipe_of(frozen->options);
  const bool tensorwise = recipe.weight_granularity == Granularity::kTensorwise;
  const bool rowwise = recipe.weight_granularity == Granularity::kRowwise;
  const torch::Tensor weight = layer->weight.detach();
  const auto [codes, scale] =
      tensorwise
          ? quantize_tensorwise(weight, at::kFloat8_e4m3fn, std::nullopt, recipe.power_of_two)
      : rowwise ? quantize_rowwise(weight, at::kFloat8_e4m3fn, recipe.power_of_two)
                : quantize_blockwise_128x128(weight, at::kFloat8_e4m3fn, recipe.power_of_two);
  // As bytes: padded codes and scales become contiguous.
  frozen->weight.set_data(
      codes.view(at::kByte).clone(at::MemoryFormat::Contiguous).view(at::kFloat8_e4m3fn));
  frozen->weight_scale.set_data(scale.clone(at::MemoryFormat::Contiguous));
  if (layer->bias.defined()) frozen->bias.set_data(layer->bias.detach().clone());
  if (layer->input_scale.defined()) frozen->input_scale.set_data(layer->input_scale.clone());
  frozen->train(layer->is_training());
  return frozen;
}

}  // namespace fp8::nn
