// fp8::nn::GatedMLP and fp8::nn::MLP (fp8/nn_blocks.h).
#include <initializer_list>

#include "fp8/nn_blocks.h"
#include "fp8/ops.h"
#include "torch/common/messages.h"
#include "torch/common/recipe.h"
#include "torch/mlp/mlp.h"
#include "torch/mlp/unit.h"

namespace fp8::nn {
namespace {

template <typename Options>
void check_options(const Options& options) {
  recipe_id(options.recipe());
  const auto activation =
      static_cast<mlp_node::Activation>(mlp_node::activation_index(options.activation()));
  FP8_CHECK_VALUE(activation != mlp_node::Activation::kClampedSilu,
                  "fp8::nn: expected an activation of one input, got 'clamped_silu', which "
                  "fp8::mlp has");
}

template <typename Options>
Linear layer(const Options& options, int64_t in_features, int64_t out_features) {
  return Linear(
      LinearOptions(in_features, out_features).bias(options.bias()).recipe(options.recipe()));
}

template <typename Options>
void print(std::ostream& stream, const char* name, const Options& options) {
  stream << "fp8::nn::" << name << "(hidden=" << options.hidden()
         << ", intermediate=" << options.intermediate() << ", activation=" << options.activation()
         << ", bias=" << (options.bias() ? "true" : "false") << ", recipe=" << options.recipe()
         << (options.save() == "bf16" ? ")" : ", save=" + options.save() + ")");
}

bool any_static(std::initializer_list<Linear> layers) {
  for (const Linear& one : layers) {
    if (one->input_scale.defined()) return true;
  }
  return false;
}

std::optional<torch::Tensor> bias_of(const Linear& one) {
  return one->bias.defined() ? std::optional(one->bias) : std::nullopt;
}

template <typename Options>
torch::Tensor act(const Options& options, const torch::Tensor& x) {
  return mlp_node::act(
      static_cast<mlp_node::Activation>(mlp_node::activation_index(options.activation())), x);
}

// What the operator is told beside weights; of the layer without a bias of its own, none.
template <typename Options>
MlpOptions node_options(const Options& options, Linear& gate, Linear& down) {
  return {.activation = options.activation(),
          .recipe = options.recipe(),
          .gate_bias = bias_of(gate),
          .down_bias = bias_of(down),
          .save = options.save(),
          .gate_history = gate->current_history(),
          .down_history = down->current_history()};
}

}  // namespace

GatedMLPOptions::GatedMLPOptions(int64_t hidden, int64_t intermediate)
    : hidden_(hidden), intermediate_(intermediate) {}

GatedMLPImpl::GatedMLPImpl(int64_t hidden, int64_t intermediate)
    : GatedMLPImpl(GatedMLPOptions(hidden, intermediate)) {}

GatedMLPImpl::GatedMLPImpl(const GatedMLPOptions& options_) : options(options_) {
  check_options(options);
  GatedMLPImpl::reset();
}

void GatedMLPImpl::reset() {
  const int64_t hidden = options.hidden();
  const int64_t intermediate = options.intermediate();
  gate_proj = register_module("gate_proj", layer(options, hidden, intermediate));
  up_proj = register_module("up_proj", layer(options, hidden, intermediate));
  down_proj = register_module("down_proj", layer(options, intermediate, hidden));
}

void GatedMLPImpl::pretty_print(std::ostream& stream) const { print(stream, "GatedMLP", options); }

torch::Tensor GatedMLPImpl::forward(const torch::Tensor& x) {
  if (any_static({gate_proj, up_proj, down_proj})) {
    return down_proj(act(options, gate_proj(x)) * up_proj(x));
  }
  MlpOptions node = node_options(options, gate_proj, down_proj);
  node.up_bias = bias_of(up_proj);
  node.up_history = up_proj->current_history();
  return mlp(x, gate_proj->weight, up_proj->weight, down_proj->weight, node);
}

MLPOptions::MLPOptions(int64_t hidden, int64_t intermediate)
    : hidden_(hidden), intermediate_(intermediate) {}

MLPImpl::MLPImpl(int64_t hidden, int64_t intermediate)
    : MLPImpl(MLPOptions(hidden, intermediate)) {}

MLPImpl::MLPImpl(const MLPOptions& options_) : options(options_) {
  check_options(options);
  MLPImpl::reset();
}

void MLPImpl::reset() {
  fc1 = register_module("fc1", layer(options, options.hidden(), options.intermediate()));
  fc2 = register_module("fc2", layer(options, options.intermediate(), options.hidden()));
}

void MLPImpl::pretty_print(std::ostream& stream) const { print(stream, "MLP", options); }

torch::Tensor MLPImpl::forward(const torch::Tensor& x) {
  if (any_static({fc1, fc2})) return fc2(act(options, fc1(x)));
  return mlp(x, fc1->weight, std::nullopt, fc2->weight, node_options(options, fc1, fc2));
}

}  // namespace fp8::nn
