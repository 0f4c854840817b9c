// fp8::nn::MergedLinear (fp8/nn.h).
#include "fp8/nn.h"
#include "fp8/ops.h"
#include "torch/common/messages.h"
#include "torch/common/recipe.h"

namespace fp8::nn {

MergedLinearOptions::MergedLinearOptions(int64_t in_features, std::vector<int64_t> out_features)
    : in_features_(in_features), out_features_(std::move(out_features)) {}

MergedLinearImpl::MergedLinearImpl(int64_t in_features, std::vector<int64_t> out_features)
    : MergedLinearImpl(MergedLinearOptions(in_features, std::move(out_features))) {}

MergedLinearImpl::MergedLinearImpl(const MergedLinearOptions& options_) : options(options_) {
  recipe_id(options.recipe());
  FP8_CHECK_VALUE(!options.out_features().empty(),
                  "fp8::nn::MergedLinear: expected out_features of a layer at least, got none");
  MergedLinearImpl::reset();
}

void MergedLinearImpl::reset() {
  layers.clear();
  history = torch::Tensor();
  for (size_t i = 0; i < options.out_features().size(); ++i) {
    const auto of_layer = LinearOptions(options.in_features(), options.out_features()[i])
                              .bias(options.bias())
                              .recipe(options.recipe());
    layers.push_back(register_module(std::to_string(i), Linear(of_layer)));
  }
}

void MergedLinearImpl::pretty_print(std::ostream& stream) const {
  stream << "fp8::nn::MergedLinear(in_features=" << options.in_features() << ", out_features=[";
  for (size_t i = 0; i < options.out_features().size(); ++i) {
    stream << (i == 0 ? "" : ", ") << options.out_features()[i];
  }
  stream << "], bias=" << (options.bias() ? "true" : "false") << ", recipe=" << options.recipe()
         << ")";
}

std::vector<torch::Tensor> MergedLinearImpl::forward(const torch::Tensor& input) {
  std::vector<torch::Tensor> outputs;
  bool is_static = false;
  for (const Linear& layer : layers) is_static = is_static || layer->input_scale.defined();
  if (is_static) {
    for (Linear& layer : layers) outputs.push_back(layer->forward(input));
    return outputs;
  }
  std::vector<torch::Tensor> weights;
  std::vector<std::optional<torch::Tensor>> biases;
  for (const Linear& layer : layers) {
    weights.push_back(layer->weight);
    biases.push_back(layer->bias.defined() ? std::optional(layer->bias) : std::nullopt);
  }
  std::optional<torch::Tensor> moved_on;
  if (recipe_at(recipe_id(options.recipe())).delayed) {
    if (!history.defined() || history.device() != input.device()) {
      history = make_history(input.device());
    }
    moved_on = history;
  }
  return merged_linear(input, weights, biases, options.recipe(), moved_on);
}

}  // namespace fp8::nn
