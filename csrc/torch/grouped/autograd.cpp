// Gradients of grouped_linear and moe_experts. Each saves only what its backward will need.
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <utility>

#include "fp8/ops.h"
#include "host/ranges.h"
#include "torch/common/main_grad.h"
#include "torch/common/operators.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/grouped/grouped_ops.h"

namespace fp8::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a forward kept, undefined where that is an empty tensor.
at::Tensor or_undefined(const at::Tensor& kept) { return kept.dim() == 2 ? kept : at::Tensor(); }

// A main_grad with the context; no saved tensor: it is meant to change, and must not be offloaded.
void keep(AutogradContext* ctx, const std::string& name, const GradientBuffer* buffer) {
  if (buffer == nullptr) return;
  ctx->saved_data[name + "main_grad"] = buffer->main_grad;
  ctx->saved_data[name + "overwrite"] = buffer->overwrite;
  ctx->saved_data[name + "stand_in"] = buffer->stand_in;
}

// What a backward does with it.
struct KeptBuffer {
  std::optional<at::Tensor> main_grad;
  bool overwrite = false;
  at::Tensor stand_in;  // may be undefined

  // wanted: whether the backward reaches the weight.
  KeptBuffer(AutogradContext* ctx, const std::string& name, bool wanted) {
    const auto found = ctx->saved_data.find(name + "main_grad");
    if (!wanted || found == ctx->saved_data.end()) return;
    main_grad = found->second.toTensor();
    overwrite = ctx->saved_data[name + "overwrite"].toBool();
    // Detached: nobody else refers to this tensor, so autograd keeps it and copies nothing.
    const auto given = ctx->saved_data[name + "stand_in"].toOptional<at::Tensor>();
    if (given) stand_in = given->detach();
  }
  // What autograd gets, when the backward is over; its operator's own kernel for autograd counts no
  // write.
  at::Tensor gradient(const at::Tensor& dweight) const {
    count_write(main_grad);
    return main_grad ? stand_in : dweight;
  }
};

class GroupedLinear : public torch::autograd::Function<GroupedLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                            int64_t recipe, const GradientBuffer* buffer) {
    const Range range("fp8::grouped_linear");
    const bool needs_dx = x.requires_grad();
    const bool needs_dweight = weight.requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<decltype(kernel::_grouped_forward)>("fp8::_grouped_forward");
    auto [y, x_t, x_t_scale, padded_offsets, amax] =
        op.call(x, weight, offsets, bias, recipe, needs_dweight, /*save_amax=*/needs_dx);
    const at::Tensor none;
    const bool fp8_wgrad = needs_dweight && grouped_recipe_at(recipe).fp8_wgrad;
    ctx->save_for_backward({needs_dweight ? (fp8_wgrad ? x_t : x) : none,
                            fp8_wgrad ? x_t_scale : none, fp8_wgrad ? padded_offsets : none,
                            needs_dx ? weight : none, offsets, or_undefined(amax)});
    ctx->saved_data["in_features"] = weight.sym_size(2);
    ctx->saved_data["transposed"] = is_stored_transposed(weight);
    ctx->saved_data["recipe"] = recipe;
    ctx->saved_data["needs_dx"] = needs_dx;
    ctx->saved_data["needs_dweight"] = needs_dweight;
    ctx->saved_data["needs_dbias"] = wants_grad(bias);
    keep(ctx, "", buffer);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Range range("fp8::grouped_linear backward");
    const at::Tensor none;
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return {none, none, none, none, none, none};
    const variable_list saved = ctx->get_saved_variables();
    // Of what the forward could foresee, what this backward is for: x is input 0, weight 1, offsets
    // 2, and a bias 3.
    const bool needs_dx = ctx->saved_data["needs_dx"].toBool() && ctx->needs_input_grad(0);
    const bool needs_dweight =
        ctx->saved_data["needs_dweight"].toBool() && ctx->needs_input_grad(1);
    const bool needs_dbias = ctx->saved_data["needs_dbias"].toBool() && ctx->needs_input_grad(3);
    const KeptBuffer buffer(ctx, "", needs_dweight);
    static const auto op = find<decltype(kernel::_grouped_backward)>("fp8::_grouped_backward");
    const auto [dx, dweight, dbias] =
        op.call(dy, optional(saved[0]), optional(saved[1]), optional(saved[2]), optional(saved[3]),
                saved[4], ctx->saved_data["in_features"].toSymInt(),
                ctx->saved_data["transposed"].toBool(), ctx->saved_data["recipe"].toInt(), needs_dx,
                needs_dweight, needs_dbias, optional(saved[5]), buffer.main_grad, buffer.overwrite);
    return {needs_dx ? dx : none,
            needs_dweight ? buffer.gradient(dweight) : none,
            none,
            needs_dbias ? dbias : none,
            none,
            none};
  }
};

// Whether a saved tensor, which only the context and the caller's `saved` refer to, can be
// overwritten and its memory given back: this backward is the only one (no retain_graph), nobody
// traces or records it, and no hook on saved tensors kept the tensor in Python.
bool is_last_use(const at::Tensor& saved) {
  const c10::impl::PyObjectSlot& python = *saved.unsafeGetTensorImpl()->pyobj_slot();
  return !torch::autograd::get_current_graph_task_keep_graph() &&
         !at::isTensorSubclassLike(saved) && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         saved.use_count() <= 2 && saved.storage().use_count() == 1 &&
         (python.load_pyobj() == nullptr || python.has_unique_reference());
}

// What moe_experts takes beside tensors.
struct MoeOptions {
  int64_t activation = 0;
  bool interleaved;
  double alpha;
  double limit;
  int64_t recipe = 0;
  const GradientBuffer* gate_up_buffer = nullptr;  // optional
  const GradientBuffer* down_buffer = nullptr;     // the same
};

class MoeExperts : public torch::autograd::Function<MoeExperts> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
                            const at::Tensor& gate_up, const at::Tensor& down,
                            const std::optional<at::Tensor>& gate_up_bias,
                            const std::optional<at::Tensor>& down_bias, const MoeOptions* options) {
    const Range range("fp8::moe_experts");
    const int64_t wanted = (x.requires_grad() ? needs::kX : 0) |
                           (top_k_weights.requires_grad() ? needs::kWeights : 0) |
                           (gate_up.requires_grad() ? needs::kGateUp : 0) |
                           (down.requires_grad() ? needs::kDown : 0) |
                           (wants_grad(gate_up_bias) ? needs::kGateUpBias : 0) |
                           (wants_grad(down_bias) ? needs::kDownBias : 0);
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor weights = top_k_weights.to(at::kFloat);
    static const auto op = find<decltype(kernel::_moe_forward)>("fp8::_moe_forward");
    auto [y, gate_up_out, offsets, place, source, gate_up_amax, down_amax] = op.call(
        x, top_k_index, weights, gate_up, down, gate_up_bias, down_bias, options->activation,
        options->interleaved, options->alpha, options->limit, options->recipe, /*save_amax=*/true);
    const at::Tensor none;
    ctx->save_for_backward({x, top_k_index, weights, gate_up, down, gate_up_bias.value_or(none),
                            down_bias.value_or(none), gate_up_out, offsets, place, source,
                            or_undefined(gate_up_amax), or_undefined(down_amax)});
    ctx->saved_data["activation"] = options->activation;
    ctx->saved_data["interleaved"] = options->interleaved;
    ctx->saved_data["alpha"] = options->alpha;
    ctx->saved_data["limit"] = options->limit;
    ctx->saved_data["recipe"] = options->recipe;
    ctx->saved_data["needs"] = wanted;
    ctx->saved_data["weights_dtype"] = static_cast<int64_t>(top_k_weights.scalar_type());
    keep(ctx, "gate_up_", options->gate_up_buffer);
    keep(ctx, "down_", options->down_buffer);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Range range("fp8::moe_experts backward");
    const at::Tensor& dy = grads[0];
    variable_list result(8);
    if (!dy.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const int64_t wanted = asked_for(ctx, ctx->saved_data["needs"].toInt(), saved[5].defined());
    const KeptBuffer gate_up(ctx, "gate_up_", (wanted & needs::kGateUp) != 0);
    const KeptBuffer down(ctx, "down_", (wanted & needs::kDown) != 0);
    const int64_t how = (is_last_use(saved[7]) ? needs::kMayConsume : 0) |
                        (gate_up.overwrite ? needs::kOverwriteGateUp : 0) |
                        (down.overwrite ? needs::kOverwriteDown : 0);
    static const auto op = find<decltype(kernel::_moe_backward)>("fp8::_moe_backward");
    const auto [dx, d_weights, d_gate_up, d_down, d_gate_up_bias, d_down_bias] =
        op.call(dy, saved[0], saved[1], saved[2], saved[3], saved[4], optional(saved[5]),
                optional(saved[6]), saved[7], saved[8], saved[9], saved[10],
                ctx->saved_data["activation"].toInt(), ctx->saved_data["interleaved"].toBool(),
                ctx->saved_data["alpha"].toDouble(), ctx->saved_data["limit"].toDouble(),
                ctx->saved_data["recipe"].toInt(), wanted | how, optional(saved[11]),
                optional(saved[12]), gate_up.main_grad, down.main_grad);
    const auto weights_dtype =
        static_cast<at::ScalarType>(ctx->saved_data["weights_dtype"].toInt());
    if ((wanted & needs::kX) != 0) result[0] = dx;
    if ((wanted & needs::kWeights) != 0) result[2] = d_weights.to(weights_dtype);
    if ((wanted & needs::kGateUp) != 0) result[3] = gate_up.gradient(d_gate_up);
    if ((wanted & needs::kDown) != 0) result[4] = down.gradient(d_down);
    if ((wanted & needs::kGateUpBias) != 0) result[5] = d_gate_up_bias;
    if ((wanted & needs::kDownBias) != 0) result[6] = d_down_bias;
    return result;
  }

 private:
  // Of what the forward could foresee, what this backward is for. An input that is not there has no
  // number.
  static int64_t asked_for(const AutogradContext* ctx, int64_t foreseen, bool has_gate_up_bias) {
    const std::array<std::pair<int64_t, size_t>, 6> inputs{
        {{needs::kX, 0},
         {needs::kWeights, 2},
         {needs::kGateUp, 3},
         {needs::kDown, 4},
         {needs::kGateUpBias, 5},
         {needs::kDownBias, has_gate_up_bias ? 6 : 5}}};
    int64_t wanted = 0;
    for (const auto& [bit, input] : inputs) {
      if ((foreseen & bit) != 0 && ctx->needs_input_grad(input)) wanted |= bit;
    }
    return wanted;
  }
};

at::Tensor differentiable_grouped(const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                                  std::string_view recipe, const GradientBuffer* buffer) {
  const int64_t index = grouped_recipe_id("grouped_linear", recipe);
  if (!at::GradMode::is_enabled() ||
      !(x.requires_grad() || weight.requires_grad() || wants_grad(bias))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return fp8::grouped_linear(x, weight, offsets, bias, recipe);
  }
  check_grouped_linear(x, weight, offsets, bias);
  if (!weight.requires_grad()) buffer = nullptr;
  if (buffer != nullptr) {
    check_main_grad("grouped_linear", "main_grad", buffer->main_grad, weight.sym_sizes(), x);
  }
  return GroupedLinear::apply(x, weight, offsets, bias, index, buffer);
}

at::Tensor differentiable_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                                  const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                                  const at::Tensor& down,
                                  const std::optional<at::Tensor>& gate_up_bias,
                                  const std::optional<at::Tensor>& down_bias,
                                  std::string_view activation, std::string_view recipe,
                                  MoeOptions options) {
  options.activation = activation_index(activation);
  options.recipe = grouped_recipe_id("moe_experts", recipe);
  if (!at::GradMode::is_enabled() ||
      !(x.requires_grad() || top_k_weights.requires_grad() || gate_up.requires_grad() ||
        down.requires_grad() || wants_grad(gate_up_bias) || wants_grad(down_bias))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return fp8::moe_experts(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias,
                            activation, options.interleaved, options.alpha, options.limit, recipe);
  }
  check_moe_experts(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias);
  const auto checked = [&](const char* name, const GradientBuffer* buffer,
                           const at::Tensor& weight) -> const GradientBuffer* {
    if (buffer == nullptr || !weight.requires_grad()) return nullptr;
    check_main_grad("moe_experts", name, buffer->main_grad, weight.sym_sizes(), x);
    return buffer;
  };
  options.gate_up_buffer = checked("gate_up_main_grad", options.gate_up_buffer, gate_up);
  options.down_buffer = checked("down_main_grad", options.down_buffer, down);
  return MoeExperts::apply(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias,
                           &options);
}

}  // namespace

at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets,
                          const std::optional<at::Tensor>& bias, std::string_view recipe) {
  return differentiable_grouped(x, weight, offsets, bias, recipe, nullptr);
}

at::Tensor _grouped_linear_into(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                                std::string_view recipe, const at::Tensor& main_grad,
                                bool overwrite, const std::optional<at::Tensor>& stand_in) {
  const GradientBuffer buffer{main_grad, overwrite, stand_in};
  return differentiable_grouped(x, weight, offsets, bias, recipe, &buffer);
}

at::Tensor moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                       const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                       const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,
                       const std::optional<at::Tensor>& down_bias, std::string_view activation,
                       bool interleaved, double alpha, double limit, std::string_view recipe) {
  return differentiable_experts(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias,
                                down_bias, activation, recipe,
                                {.interleaved = interleaved, .alpha = alpha, .limit = limit});
}

at::Tensor _moe_experts_into(const at::Tensor& x, const at::Tensor& top_k_index,
                             const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                             const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,
                             const std::optional<at::Tensor>& down_bias,
                             std::string_view activation, bool interleaved, double alpha,
                             double limit, std::string_view recipe,
                             const std::optional<at::Tensor>& gate_up_main_grad,
                             const std::optional<at::Tensor>& down_main_grad,
                             bool overwrite_gate_up, bool overwrite_down,
                             const std::optional<at::Tensor>& gate_up_stand_in,
                             const std::optional<at::Tensor>& down_stand_in) {
  const at::Tensor none;
  const GradientBuffer of_gate_up{gate_up_main_grad ? *gate_up_main_grad : none, overwrite_gate_up,
                                  gate_up_stand_in};
  const GradientBuffer of_down{down_main_grad ? *down_main_grad : none, overwrite_down,
                               down_stand_in};
  return differentiable_experts(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias,
                                down_bias, activation, recipe,
                                {.interleaved = interleaved,
                                 .alpha = alpha,
                                 .limit = limit,
                                 .gate_up_buffer = gate_up_main_grad ? &of_gate_up : nullptr,
                                 .down_buffer = down_main_grad ? &of_down : nullptr});
}

}  // namespace fp8::autograd

namespace fp8::in_place {

std::tuple<at::Tensor, at::Tensor, at::Tensor> _grouped_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& padded_offsets,
    const std::optional<at::Tensor>& weight, const at::Tensor& offsets, c10::SymInt in_features,
    bool transposed, int64_t recipe, bool needs_dx, bool needs_dweight, bool needs_dbias,
    const std::optional<at::Tensor>& weight_amax, const std::optional<at::Tensor>& main_grad,
    bool overwrite) {
  static const auto op = find<decltype(kernel::_grouped_backward)>("fp8::_grouped_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  auto made =
      op.call(dy, x, x_t_scale, padded_offsets, weight, offsets, std::move(in_features), transposed,
              recipe, needs_dx, needs_dweight, needs_dbias, weight_amax, main_grad, overwrite);
  count_write(main_grad);
  return made;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _moe_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& top_k_index,
    const at::Tensor& top_k_weights, const at::Tensor& gate_up, const at::Tensor& down,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    const at::Tensor& gate_up_out, const at::Tensor& offsets, const at::Tensor& place,
    const at::Tensor& source, int64_t activation, bool interleaved, double alpha, double limit,
    int64_t recipe, int64_t needs, const std::optional<at::Tensor>& gate_up_amax,
    const std::optional<at::Tensor>& down_amax, const std::optional<at::Tensor>& gate_up_main_grad,
    const std::optional<at::Tensor>& down_main_grad) {
  static const auto op = find<decltype(kernel::_moe_backward)>("fp8::_moe_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  auto made = op.call(dy, x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias,
                      gate_up_out, offsets, place, source, activation, interleaved, alpha, limit,
                      recipe, needs, gate_up_amax, down_amax, gate_up_main_grad, down_main_grad);
  count_write(gate_up_main_grad);
  count_write(down_main_grad);
  return made;
}

}  // namespace fp8::in_place
