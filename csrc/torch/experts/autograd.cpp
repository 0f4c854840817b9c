// experts_frozen's gradients: of x, of the routing weights and of the biases. Nothing of x is
// saved.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "host/ranges.h"
#include "torch/common/messages.h"
#include "torch/common/operators.h"
#include "torch/experts/experts_frozen.h"
#include "torch/grouped/grouped_ops.h"

namespace fp8::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What is not differentiated and no tensor.
struct ExpertsFrozenForm {
  int64_t activation;
  bool interleaved;
  double alpha;
  double limit;
  bool blocks;
  bool power_of_two;
};

class ExpertsFrozen : public torch::autograd::Function<ExpertsFrozen> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
                            const at::Tensor& gate_up, const at::Tensor& gate_up_scale,
                            const at::Tensor& down, const at::Tensor& down_scale,
                            const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
                            const ExpertsFrozenForm* form) {
    const Range range("fp8::experts_frozen");
    const int64_t foreseen = (x.requires_grad() ? needs::kX : 0) |
                             (top_k_weights.requires_grad() ? needs::kWeights : 0) |
                             (wants_grad(gate_up_bias) ? needs::kGateUpBias : 0) |
                             (wants_grad(down_bias) ? needs::kDownBias : 0);
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor weights = experts::in_float(top_k_weights);
    static const auto op =
        find<decltype(kernel::_experts_frozen_forward)>("fp8::_experts_frozen_forward");
    auto [y, gate_up_out, offsets, place, source] =
        op.call(x, top_k_index, weights, gate_up, gate_up_scale, down, down_scale, gate_up_bias,
                down_bias, form->activation, form->interleaved, form->alpha, form->limit,
                form->blocks, form->power_of_two);
    const at::Tensor none;
    ctx->save_for_backward({top_k_index, weights, gate_up, gate_up_scale, down, down_scale,
                            gate_up_bias.value_or(none), down_bias.value_or(none), gate_up_out,
                            offsets, place, source});
    ctx->saved_data["activation"] = form->activation;
    ctx->saved_data["interleaved"] = form->interleaved;
    ctx->saved_data["alpha"] = form->alpha;
    ctx->saved_data["limit"] = form->limit;
    ctx->saved_data["blocks"] = form->blocks;
    ctx->saved_data["power_of_two"] = form->power_of_two;
    ctx->saved_data["needs"] = foreseen;
    ctx->saved_data["weights_dtype"] = static_cast<int64_t>(top_k_weights.scalar_type());
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Range range("fp8::experts_frozen backward");
    variable_list result(10);
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const int64_t wanted = asked_for(ctx, saved[6].defined());
    static const auto op =
        find<decltype(kernel::_experts_frozen_backward)>("fp8::_experts_frozen_backward");
    const auto [dx, d_weights, d_gate_up_bias, d_down_bias] = op.call(
        dy, saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], optional(saved[6]),
        optional(saved[7]), saved[8], saved[9], saved[10], saved[11],
        ctx->saved_data["activation"].toInt(), ctx->saved_data["interleaved"].toBool(),
        ctx->saved_data["alpha"].toDouble(), ctx->saved_data["limit"].toDouble(),
        ctx->saved_data["blocks"].toBool(), ctx->saved_data["power_of_two"].toBool(), wanted);
    const auto weights_dtype =
        static_cast<at::ScalarType>(ctx->saved_data["weights_dtype"].toInt());
    if ((wanted & needs::kX) != 0) result[0] = dx;
    if ((wanted & needs::kWeights) != 0) result[2] = d_weights.to(weights_dtype);
    if ((wanted & needs::kGateUpBias) != 0) result[7] = d_gate_up_bias;
    if ((wanted & needs::kDownBias) != 0) result[8] = d_down_bias;
    return result;
  }

 private:
  // Of what the forward could foresee, what this backward is for. An input that is not there has no
  // number.
  static int64_t asked_for(AutogradContext* ctx, bool has_gate_up_bias) {
    const int64_t foreseen = ctx->saved_data["needs"].toInt();
    const std::array<std::pair<int64_t, size_t>, 4> inputs{
        {{needs::kX, 0},
         {needs::kWeights, 2},
         {needs::kGateUpBias, 7},
         {needs::kDownBias, has_gate_up_bias ? 8 : 7}}};
    int64_t wanted = 0;
    for (const auto& [bit, input] : inputs) {
      if ((foreseen & bit) != 0 && ctx->needs_input_grad(input)) wanted |= bit;
    }
    return wanted;
  }
};

bool has_frozen_tangent(const at::Tensor& t) { return t._fw_grad(0).defined(); }

}  // namespace

at::Tensor experts_frozen(const at::Tensor& x, const at::Tensor& top_k_index,
                          const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                          const at::Tensor& gate_up_scale, const at::Tensor& down,
                          const at::Tensor& down_scale, const OptionalTensor& gate_up_bias,
                          const OptionalTensor& down_bias, std::string_view activation,
                          bool interleaved, double alpha, double limit,
                          std::optional<std::string_view> input_granularity, bool power_of_two) {
  TORCH_CHECK_NOT_IMPLEMENTED(!has_frozen_tangent(x) && !has_frozen_tangent(top_k_weights),
                              "fp8::experts_frozen: expected reverse mode, got a tangent: "
                              "forward-mode AD (jvp) is not supported");
  if (at::GradMode::is_enabled()) {
    FP8_CHECK_VALUE(!gate_up.requires_grad() && !gate_up_scale.requires_grad() &&
                        !down.requires_grad() && !down_scale.requires_grad(),
                    "fp8::experts_frozen: expected weights and scales without requires_grad, got "
                    "one that requires a gradient; train with moe_experts");
    if (x.requires_grad() || top_k_weights.requires_grad() || wants_grad(gate_up_bias) ||
        wants_grad(down_bias)) {
      const bool blocks =
          experts::checked_blocks(x, top_k_index, top_k_weights, gate_up, gate_up_scale, down,
                                  down_scale, gate_up_bias, down_bias, input_granularity);
      const ExpertsFrozenForm form{activation_index(activation, "experts_frozen"),
                                   interleaved,
                                   alpha,
                                   limit,
                                   blocks,
                                   power_of_two};
      return ExpertsFrozen::apply(x, top_k_index, top_k_weights, gate_up, gate_up_scale, down,
                                  down_scale, gate_up_bias, down_bias, &form);
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  static const auto op = find<decltype(composite::experts_frozen)>("fp8::experts_frozen");
  return op.call(x, top_k_index, top_k_weights, gate_up, gate_up_scale, down, down_scale,
                 gate_up_bias, down_bias, activation, interleaved, alpha, limit, input_granularity,
                 power_of_two);
}

}  // namespace fp8::autograd
