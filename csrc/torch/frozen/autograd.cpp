// linear_frozen's gradient: of x, and of the bias. Nothing of x is saved.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "host/ranges.h"
#include "torch/common/messages.h"
#include "torch/common/operators.h"
#include "torch/frozen/frozen.h"
#include "torch/quantize/memory.h"

namespace fp8::autograd {
namespace {

using frozen::OptionalTensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& forward_op() {
  static const auto op = find<decltype(kernel::linear_frozen)>("fp8::linear_frozen");
  return op;
}

// What is not differentiated: no arguments of the node.
struct FrozenOptions {
  const OptionalTensor& input_scale;
  std::optional<std::string_view> input_granularity;
  bool power_of_two;
  bool decode;
  bool blocks;  // what the weight's scales are of
};

class LinearFrozen : public torch::autograd::Function<LinearFrozen> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& bias,
                            const at::Tensor& weight, const at::Tensor& weight_scale,
                            const FrozenOptions* options) {
    const Range range("fp8::linear_frozen");
    const at::AutoDispatchBelowADInplaceOrView below;
    std::optional<memory::EagerScope> shares_input;
    if (!x.is_leaf()) shares_input.emplace();
    at::Tensor y =
        forward_op().call(x, weight, weight_scale, bias, options->input_scale,
                          options->input_granularity, options->power_of_two, options->decode);
    const at::Tensor none;
    const bool dx = x.requires_grad();
    ctx->save_for_backward({dx ? weight : none, dx ? weight_scale : none});
    ctx->saved_data["dx"] = dx;
    ctx->saved_data["dbias"] = bias && bias->requires_grad();
    ctx->saved_data["blocks"] = options->blocks;
    ctx->saved_data["power_of_two"] = options->power_of_two;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Range range("fp8::linear_frozen backward");
    variable_list result(5);
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    if (ctx->saved_data["dx"].toBool() && ctx->needs_input_grad(0)) {
      const variable_list saved = ctx->get_saved_variables();
      static const auto op =
          find<decltype(kernel::_linear_frozen_backward)>("fp8::_linear_frozen_backward");
      result[0] = op.call(dy, saved[0], saved[1], ctx->saved_data["blocks"].toBool(),
                          ctx->saved_data["power_of_two"].toBool());
    }
    if (ctx->saved_data["dbias"].toBool() && ctx->needs_input_grad(1)) {
      result[1] = dy.dim() == 1 ? dy : dy.flatten(0, -2).sum(0);
    }
    return result;
  }
};

bool has_tangent(const at::Tensor& t) { return t._fw_grad(0).defined(); }

}  // namespace

at::Tensor linear_frozen(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& weight_scale, const OptionalTensor& bias,
                         const OptionalTensor& input_scale,
                         std::optional<std::string_view> input_granularity, bool power_of_two,
                         bool decode) {
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(x) && !(bias && has_tangent(*bias)),
                              "fp8::linear_frozen: expected reverse mode, got a tangent: "
                              "forward-mode AD (jvp) is not supported; use nn.Linear there");
  if (at::GradMode::is_enabled()) {
    FP8_CHECK_VALUE(
        !weight.requires_grad() && !weight_scale.requires_grad() && !wants_grad(input_scale),
        "fp8::linear_frozen: expected weight, weight_scale and input_scale without requires_grad, "
        "got one that requires a gradient; train with fp8.Linear");
    if (x.requires_grad() || wants_grad(bias)) {
      const frozen::Form form =
          frozen::checked_form(x, weight, weight_scale, bias, input_scale, input_granularity);
      const FrozenOptions options{input_scale, input_granularity, power_of_two, decode,
                                  form.weight == core::Granularity::kBlock128x128};
      return LinearFrozen::apply(x, bias, weight, weight_scale, &options);
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return forward_op().call(x, weight, weight_scale, bias, input_scale, input_granularity,
                           power_of_two, decode);
}

}  // namespace fp8::autograd
