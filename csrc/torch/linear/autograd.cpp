// fused_linear's gradient. The graph keeps FP8 tensors where the recipe allows, and only what the
// backward will need: no x^T under a frozen weight, no weight when x needs no gradient.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "fp8/ops.h"
#include "host/ranges.h"
#include "torch/common/main_grad.h"
#include "torch/common/messages.h"
#include "torch/common/operators.h"
#include "torch/common/recipe.h"
#include "torch/linear/linear.h"
#include "torch/quantize/memory.h"

namespace fp8::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Needs {
  bool dx;
  bool dweight;
  bool dbias;
};

// What is not differentiated: no arguments of the node, whose backward has a gradient for each.
struct Extras {
  const GradientBuffer* buffer;                  // optional
  const std::optional<at::Tensor>& input_scale;  // [] fp32
  const std::optional<at::Tensor>& history;      // [3, kAmaxHistorySize] int32
};

class FusedLinear : public torch::autograd::Function<FusedLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, int64_t recipe, int64_t needs,
                            const Extras* extras) {
    const Range range("fp8::fused_linear");
    const GradientBuffer* buffer = extras->buffer;
    const auto [dx, dweight, dbias] = unpack(needs);
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<decltype(kernel::_linear_forward)>("fp8::_linear_forward");
    std::optional<memory::EagerScope> shares_input;
    if (!x.is_leaf()) shares_input.emplace();
    auto [y, x_t, x_t_scale, weight_amax] =
        op.call(x, weight, bias, recipe, dweight, dx, extras->input_scale, extras->history);
    count_write(extras->history);
    const bool fp8_wgrad = recipe_at(recipe).fp8_wgrad;
    const bool keeps_amax = dx && recipe_at(recipe).granularity == core::Granularity::kTensorwise;
    const at::Tensor none;
    ctx->save_for_backward({dweight ? (fp8_wgrad ? x_t : x) : none,
                            dweight && fp8_wgrad ? x_t_scale : none, dx ? weight : none,
                            keeps_amax ? weight_amax : none});
    int64_t call = recipe << kRecipeShift | needs;
    if (extras->history) {  // no saved tensor: as main_grad below
      ctx->saved_data["history"] = *extras->history;
      call |= kHistory;
    }
    if (buffer != nullptr) {
      // Not a saved tensor: it is meant to change, and must not be offloaded.
      ctx->saved_data["main_grad"] = buffer->main_grad;
      ctx->saved_data["stand_in"] = buffer->stand_in;
      call |= kInto | (buffer->overwrite ? kOverwrite : 0);
    }
    ctx->saved_data["call"] = call;
    ctx->saved_data["in_features"] = weight.sym_size(1);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Range range("fp8::fused_linear backward");
    const at::Tensor none;
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return {none, none, none, none, none, none};
    const variable_list saved = ctx->get_saved_variables();
    const int64_t call = ctx->saved_data["call"].toInt();
    const Needs needs = asked_for(ctx, unpack(call));
    const bool into = (call & kInto) != 0 && needs.dweight;  // only where the weight is reached
    std::optional<at::Tensor> main_grad;
    if (into) main_grad = ctx->saved_data["main_grad"].toTensor();
    std::optional<at::Tensor> history;
    if ((call & kHistory) != 0) history = ctx->saved_data["history"].toTensor();
    static const auto op = find<decltype(kernel::_linear_backward)>("fp8::_linear_backward");
    auto [gx, gweight, gbias] =
        op.call(dy, optional(saved[0]), optional(saved[1]), optional(saved[2]), optional(saved[3]),
                ctx->saved_data["in_features"].toSymInt(), call >> kRecipeShift, needs.dx,
                needs.dweight, needs.dbias, main_grad, into && (call & kOverwrite) != 0, history);
    if (into) {
      const auto stand_in = ctx->saved_data["stand_in"].toOptional<at::Tensor>();
      // Detached: nobody else refers to this tensor, so autograd keeps it and copies nothing.
      gweight = stand_in ? stand_in->detach() : none;
    }
    return {needs.dx ? gx : none,
            needs.dweight ? gweight : none,
            needs.dbias ? gbias : none,
            none,
            none,
            none};
  }

  static int64_t pack(const Needs& needs) {
    return (needs.dx ? 1 : 0) | (needs.dweight ? 2 : 0) | (needs.dbias ? 4 : 0);
  }
  static Needs unpack(int64_t bits) { return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0}; }

 private:
  // Of what the forward could foresee, what this backward is for: torch.autograd.grad(y, x) and
  // pipelines that split the backward take part of it.
  static Needs asked_for(const AutogradContext* ctx, const Needs& foreseen) {
    return {foreseen.dx && ctx->needs_input_grad(0), foreseen.dweight && ctx->needs_input_grad(1),
            foreseen.dbias && ctx->needs_input_grad(2)};
  }

  static constexpr int64_t kInto = 8;
  static constexpr int64_t kOverwrite = 16;
  static constexpr int64_t kHistory = 32;
  static constexpr int kRecipeShift = 6;
};

// The gradient of a gradient: refused when it is asked for, not when a graph is merely created.
class NoDoubleBackward : public torch::autograd::Function<NoDoubleBackward> {
 public:
  static variable_list forward(AutogradContext* /*ctx*/, const at::Tensor& /*dy*/,
                               const at::Tensor& /*weight*/, const at::Tensor& /*x*/,
                               const at::Tensor& dx, const at::Tensor& dweight,
                               const at::Tensor& dbias) {
    return {dx, dweight, dbias};
  }
  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "fp8::fused_linear: expected one backward, got a double backward: the "
        "quantized gradient has no derivative; use nn.Linear where second "
        "derivatives are needed");
  }
};

at::Tensor differentiable_linear(const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias, std::string_view recipe,
                                 const std::optional<at::Tensor>& input_scale,
                                 const std::optional<at::Tensor>& history,
                                 const GradientBuffer* buffer) {
  const int64_t id = recipe_id(recipe);
  const Needs needs{x.requires_grad(), weight.requires_grad(), wants_grad(bias)};
  const auto has_tangent = [](const at::Tensor& t) { return t._fw_grad(0).defined(); };
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(x) && !has_tangent(weight) && !(bias && bias->defined() && has_tangent(*bias)),
      "fp8::fused_linear: expected reverse mode, got a tangent: forward-mode AD (jvp) is not "
      "supported; "
      "use nn.Linear there");
  FP8_CHECK_VALUE(!at::GradMode::is_enabled() || !wants_grad(input_scale),
                  "fp8::fused_linear: expected input_scale without requires_grad, got one that "
                  "requires a gradient; a static scale has no derivative");
  if (!at::GradMode::is_enabled() || !(needs.dx || needs.dweight || needs.dbias)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor y = fp8::fused_linear(x, weight, bias, recipe, input_scale, history);
    count_write(history);
    return y;
  }
  check_linear(x, weight, bias);
  if (!needs.dweight) buffer = nullptr;
  if (buffer != nullptr) {
    check_main_grad("fused_linear", "main_grad", buffer->main_grad, weight.sym_sizes(), x);
  }
  const Extras extras{buffer, input_scale, history};
  return FusedLinear::apply(x, weight, bias, id, FusedLinear::pack(needs), &extras);
}

}  // namespace

at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, std::string_view recipe,
                        const std::optional<at::Tensor>& input_scale,
                        const std::optional<at::Tensor>& history) {
  return differentiable_linear(x, weight, bias, recipe, input_scale, history, nullptr);
}

at::Tensor _fused_linear_into(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, std::string_view recipe,
                              const at::Tensor& main_grad, bool overwrite,
                              const std::optional<at::Tensor>& stand_in,
                              const std::optional<at::Tensor>& input_scale,
                              const std::optional<at::Tensor>& history) {
  const GradientBuffer buffer{main_grad, overwrite, stand_in};
  return differentiable_linear(x, weight, bias, recipe, input_scale, history, &buffer);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _linear_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& weight_amax, c10::SymInt in_features, int64_t recipe,
    bool needs_dx, bool needs_dweight, bool needs_dbias, const std::optional<at::Tensor>& main_grad,
    bool overwrite, const std::optional<at::Tensor>& history) {
  static const auto op = find<decltype(kernel::_linear_backward)>("fp8::_linear_backward");
  std::tuple<at::Tensor, at::Tensor, at::Tensor> grads;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    grads = op.call(dy, x, x_t_scale, weight, weight_amax, std::move(in_features), recipe, needs_dx,
                    needs_dweight, needs_dbias, main_grad, overwrite, history);
  }
  count_write(main_grad);
  count_write(history);
  if (!at::GradMode::is_enabled()) return grads;
  if (!dy.requires_grad() && !wants_grad(weight) && !wants_grad(x)) return grads;
  auto& [dx, dweight, dbias] = grads;
  const at::Tensor none;
  const variable_list out =
      NoDoubleBackward::apply(dy, weight.value_or(none), x.value_or(none), dx, dweight, dbias);
  return {out[0], out[1], out[2]};
}

}  // namespace fp8::autograd

namespace fp8::in_place {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    int64_t recipe, bool save_x_t, bool save_weight_amax,
    const std::optional<at::Tensor>& input_scale, const std::optional<at::Tensor>& history) {
  static const auto op = find<decltype(kernel::_linear_forward)>("fp8::_linear_forward");
  const at::AutoDispatchBelowADInplaceOrView below;
  auto made = op.call(x, weight, bias, recipe, save_x_t, save_weight_amax, input_scale, history);
  count_write(history);
  return made;
}

}  // namespace fp8::in_place
