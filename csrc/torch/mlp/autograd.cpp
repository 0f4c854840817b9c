// mlp's gradient: one node of the graph. It keeps x in FP8 and the products of gate and up, in
// their dtype or as FP8 codes, or x alone to make them again; of the parameters only what the
// backward needs.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>

#include "host/ranges.h"
#include "torch/common/messages.h"
#include "torch/common/operators.h"
#include "torch/common/recipe.h"
#include "torch/mlp/mlp.h"
#include "torch/quantize/memory.h"

namespace fp8::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

// What is not differentiated: no arguments of the node, whose backward has a gradient for each.
struct NodeOptions {
  int64_t activation;
  bool gate_second;
  double alpha;
  double limit;
  int64_t recipe;
  int64_t save;  // a bit of mlp_needs, or 0
  const OptionalTensor& gate_history;
  const OptionalTensor& up_history;
  const OptionalTensor& down_history;
};

constexpr std::array<const char*, 3> kHistories{"gate_history", "up_history", "down_history"};

int64_t needs_of(const at::Tensor& x, const at::Tensor& gate, const OptionalTensor& up,
                 const at::Tensor& down, const OptionalTensor& gate_bias,
                 const OptionalTensor& up_bias, const OptionalTensor& down_bias) {
  using namespace mlp_needs;
  return (x.requires_grad() ? kX : 0) | (gate.requires_grad() ? kGate : 0) |
         (wants_grad(up) ? kUp : 0) | (down.requires_grad() ? kDown : 0) |
         (wants_grad(gate_bias) ? kGateBias : 0) | (wants_grad(up_bias) ? kUpBias : 0) |
         (wants_grad(down_bias) ? kDownBias : 0);
}

class Mlp : public torch::autograd::Function<Mlp> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& gate,
                            const OptionalTensor& up, const at::Tensor& down,
                            const OptionalTensor& gate_bias, const OptionalTensor& up_bias,
                            const OptionalTensor& down_bias, const NodeOptions* options) {
    using namespace mlp_needs;
    const Range range("fp8::mlp");
    const int64_t needs =
        needs_of(x, gate, up, down, gate_bias, up_bias, down_bias) | options->save;
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<decltype(kernel::_mlp_forward)>("fp8::_mlp_forward");
    std::optional<memory::EagerScope> shares_input;
    if (!x.is_leaf()) shares_input.emplace();
    const auto [y, gate_out, up_out, gate_out_scale, up_out_scale, x_t, x_t_scale, x_amax,
                gate_amax, up_amax, down_amax, h_amax] =
        op.call(x, gate, up, down, gate_bias, up_bias, down_bias, options->activation,
                options->gate_second, options->alpha, options->limit, options->recipe, needs,
                options->gate_history, options->up_history, options->down_history);

    const Recipe recipe = recipe_at(options->recipe);
    const bool tensorwise = recipe.granularity == core::Granularity::kTensorwise;
    const bool products = (needs & (kToH | kDown)) != 0;  // of gate and up are needed
    const bool recompute = (needs & kRecompute) != 0 && products;
    const bool keeps_products = products && !recompute;
    const bool keeps_scales = keeps_products && (needs & kFp8) != 0;
    const bool wgrad = (needs & (kGate | kUp)) != 0;
    const bool weights = recompute || (needs & kX) != 0;
    const bool keeps_x = recompute || (wgrad && !recipe.fp8_wgrad);
    const at::Tensor none;
    const auto kept = [&](bool keep, const OptionalTensor& t) { return keep && t ? *t : none; };
    ctx->save_for_backward(
        {keeps_x ? x : kept(wgrad, x_t), kept(wgrad && !keeps_x, x_t_scale),
         kept(keeps_products, gate_out), kept(keeps_products && up, up_out),
         kept(keeps_scales, gate_out_scale), kept(keeps_scales && up, up_out_scale),
         kept(weights, gate), kept(weights, up), kept((needs & kToH) != 0, down),
         kept(recompute, gate_bias), kept(recompute, up_bias),
         kept(recompute && tensorwise, x_amax), kept(weights && tensorwise, gate_amax),
         kept(weights && tensorwise && up, up_amax),
         kept((needs & kToH) != 0 && tensorwise, down_amax),
         kept((needs & kDown) != 0 && tensorwise, h_amax)});
    ctx->saved_data["needs"] = needs;
    ctx->saved_data["activation"] = options->activation;
    ctx->saved_data["form"] = static_cast<int64_t>(mlp_node::form_of(gate, up, down));
    ctx->saved_data["gate_second"] = options->gate_second;
    ctx->saved_data["alpha"] = options->alpha;
    ctx->saved_data["limit"] = options->limit;
    ctx->saved_data["recipe"] = options->recipe;
    ctx->saved_data["in_features"] = x.sym_size(-1);
    ctx->saved_data["features"] = down.sym_size(1);
    ctx->saved_data["present"] = (up ? kUp : 0) | (gate_bias ? kGateBias : 0) |
                                 (up_bias ? kUpBias : 0) | (down_bias ? kDownBias : 0);
    // No saved tensors: they are meant to change between the passes.
    const std::array<const OptionalTensor*, 3> histories{
        &options->gate_history, &options->up_history, &options->down_history};
    for (size_t i = 0; i < histories.size(); ++i) {
      count_write(*histories[i]);
      if (*histories[i]) ctx->saved_data[kHistories[i]] = **histories[i];
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using namespace mlp_needs;
    const Range range("fp8::mlp backward");
    const at::Tensor& dy = grads[0];
    variable_list result(8);
    if (!dy.defined()) return result;
    const variable_list s = ctx->get_saved_variables();
    const int64_t needs = asked_for(ctx);
    std::array<OptionalTensor, 3> histories;
    for (size_t i = 0; i < histories.size(); ++i) {
      const auto found = ctx->saved_data.find(kHistories[i]);
      if (found != ctx->saved_data.end()) histories[i] = found->second.toTensor();
    }
    static const auto op = find<decltype(kernel::_mlp_backward)>("fp8::_mlp_backward");
    const auto [dx, d_gate, d_up, d_down, d_gate_bias, d_up_bias, d_down_bias] =
        op.call(dy, optional(s[0]), optional(s[1]), optional(s[2]), optional(s[3]), optional(s[4]),
                optional(s[5]), optional(s[6]), optional(s[7]), optional(s[8]), optional(s[9]),
                optional(s[10]), optional(s[11]), optional(s[12]), optional(s[13]), optional(s[14]),
                optional(s[15]), ctx->saved_data["in_features"].toSymInt(),
                ctx->saved_data["features"].toSymInt(), ctx->saved_data["form"].toInt(),
                ctx->saved_data["activation"].toInt(), ctx->saved_data["gate_second"].toBool(),
                ctx->saved_data["alpha"].toDouble(), ctx->saved_data["limit"].toDouble(),
                ctx->saved_data["recipe"].toInt(), needs, histories[0], histories[1], histories[2]);
    const std::array<std::pair<int64_t, const at::Tensor*>, 7> found{{{kX, &dx},
                                                                      {kGate, &d_gate},
                                                                      {kUp, &d_up},
                                                                      {kDown, &d_down},
                                                                      {kGateBias, &d_gate_bias},
                                                                      {kUpBias, &d_up_bias},
                                                                      {kDownBias, &d_down_bias}}};
    for (size_t i = 0; i < found.size(); ++i) {
      if ((needs & found[i].first) != 0) result[i] = *found[i].second;
    }
    return result;
  }

 private:
  // Of what the forward could foresee, what this backward is for. An input that is not there has no
  // number.
  static int64_t asked_for(AutogradContext* ctx) {
    using namespace mlp_needs;
    const int64_t foreseen = ctx->saved_data["needs"].toInt();
    const int64_t present = ctx->saved_data["present"].toInt() | kX | kGate | kDown;
    int64_t needs = foreseen & (kRecompute | kFp8);
    size_t input = 0;
    for (const int64_t bit : {kX, kGate, kUp, kDown, kGateBias, kUpBias, kDownBias}) {
      if ((present & bit) == 0) continue;
      if ((foreseen & bit) != 0 && ctx->needs_input_grad(input)) needs |= bit;
      ++input;
    }
    return needs;
  }
};

bool has_tangent(const OptionalTensor& t) { return t && t->defined() && t->_fw_grad(0).defined(); }

}  // namespace

at::Tensor mlp(const at::Tensor& x, const at::Tensor& gate, const OptionalTensor& up,
               const at::Tensor& down, std::string_view activation, std::string_view recipe,
               const OptionalTensor& gate_bias, const OptionalTensor& up_bias,
               const OptionalTensor& down_bias, std::string_view save, bool gate_second,
               double alpha, double limit, const OptionalTensor& gate_history,
               const OptionalTensor& up_history, const OptionalTensor& down_history) {
  const NodeOptions options{mlp_node::activation_index(activation),
                            gate_second,
                            alpha,
                            limit,
                            recipe_id(recipe),
                            mlp_node::save_bit(save),
                            gate_history,
                            up_history,
                            down_history};
  for (const OptionalTensor& t : {OptionalTensor(x), OptionalTensor(gate), up, OptionalTensor(down),
                                  gate_bias, up_bias, down_bias}) {
    TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(t),
                                "fp8::mlp: expected reverse mode, got a tangent: forward-mode AD "
                                "(jvp) is not supported; use nn.Linear there");
  }
  const int64_t needs = needs_of(x, gate, up, down, gate_bias, up_bias, down_bias);
  if (!at::GradMode::is_enabled() || needs == 0) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<decltype(composite::mlp)>("fp8::mlp");
    at::Tensor y = op.call(x, gate, up, down, activation, recipe, gate_bias, up_bias, down_bias,
                           save, gate_second, alpha, limit, gate_history, up_history, down_history);
    for (const auto* history : {&gate_history, &up_history, &down_history}) count_write(*history);
    return y;
  }
  check_mlp(x, gate, up, down, gate_bias, up_bias, down_bias, options.activation, options.recipe,
            gate_history, up_history, down_history);
  return Mlp::apply(x, gate, up, down, gate_bias, up_bias, down_bias, &options);
}

}  // namespace fp8::autograd

namespace fp8::in_place {

namespace {
template <typename... Histories>
void count_writes(const Histories&... histories) {
  (count_write(histories), ...);
}
}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_mlp_forward(const at::Tensor& x, const at::Tensor& gate, const std::optional<at::Tensor>& up,
             const at::Tensor& down, const std::optional<at::Tensor>& gate_bias,
             const std::optional<at::Tensor>& up_bias, const std::optional<at::Tensor>& down_bias,
             int64_t activation, bool gate_second, double alpha, double limit, int64_t recipe,
             int64_t needs, const std::optional<at::Tensor>& gate_history,
             const std::optional<at::Tensor>& up_history,
             const std::optional<at::Tensor>& down_history) {
  static const auto op = find<decltype(kernel::_mlp_forward)>("fp8::_mlp_forward");
  const at::AutoDispatchBelowADInplaceOrView below;
  auto made = op.call(x, gate, up, down, gate_bias, up_bias, down_bias, activation, gate_second,
                      alpha, limit, recipe, needs, gate_history, up_history, down_history);
  count_writes(gate_history, up_history, down_history);
  return made;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_mlp_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
              const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& gate_out,
              const std::optional<at::Tensor>& up_out,
              const std::optional<at::Tensor>& gate_out_scale,
              const std::optional<at::Tensor>& up_out_scale, const std::optional<at::Tensor>& gate,
              const std::optional<at::Tensor>& up, const std::optional<at::Tensor>& down,
              const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& up_bias,
              const std::optional<at::Tensor>& x_amax, const std::optional<at::Tensor>& gate_amax,
              const std::optional<at::Tensor>& up_amax, const std::optional<at::Tensor>& down_amax,
              const std::optional<at::Tensor>& h_amax, c10::SymInt in_features,
              c10::SymInt features, int64_t form, int64_t activation, bool gate_second,
              double alpha, double limit, int64_t recipe, int64_t needs,
              const std::optional<at::Tensor>& gate_history,
              const std::optional<at::Tensor>& up_history,
              const std::optional<at::Tensor>& down_history) {
  static const auto op = find<decltype(kernel::_mlp_backward)>("fp8::_mlp_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  auto made = op.call(dy, x, x_t_scale, gate_out, up_out, gate_out_scale, up_out_scale, gate, up,
                      down, gate_bias, up_bias, x_amax, gate_amax, up_amax, down_amax, h_amax,
                      std::move(in_features), std::move(features), form, activation, gate_second,
                      alpha, limit, recipe, needs, gate_history, up_history, down_history);
  count_writes(gate_history, up_history, down_history);
  return made;
}

}  // namespace fp8::in_place
