// merged_linear's gradient: one node of the graph with a result for each weight. The results are
// plain tensors, those above a quarter of all columns in shared memory, made below autograd's
// views: each may be modified in place. What is not reached by a backward has no gradient, not
// zeros.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "host/ranges.h"
#include "torch/common/messages.h"
#include "torch/common/operators.h"
#include "torch/common/recipe.h"
#include "torch/merged/merged.h"
#include "torch/quantize/memory.h"

namespace fp8::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

// Whether a part of y gets memory of its own. One that a graph keeps, as attention keeps v, would
// keep all of y, as q and k, which are rotated into others and gone. A copy of up to a quarter of y
// costs little; of larger ones it would cost more than the product in one piece gains.
bool is_small(const at::Tensor& part, const at::Tensor& y) {
  return part.sym_size(-1) * 4 <= y.sym_size(-1);
}

// A contiguous copy of a part. On a GPU in elements of 16 bytes where it lies on such: torch copies
// strided elements one by one, those of bf16 at a third of the rate. Not for a compiler to see.
at::Tensor copied(const at::Tensor& part) {
  const c10::DispatchKeySet traced{c10::DispatchKey::Python, c10::DispatchKey::Functionalize};
  bool wide = part.is_cuda() && !part.key_set().has_any(traced) && part.stride(-1) == 1;
  const auto whole = [&](int64_t elements) {
    return elements * static_cast<int64_t>(part.element_size()) % 16 == 0;
  };
  wide = wide && whole(part.size(-1)) && whole(part.storage_offset());
  for (int64_t d = 0; wide && d + 1 < part.dim(); ++d) wide = whole(part.stride(d));
  if (!wide) return part.clone(at::MemoryFormat::Contiguous);
  return part.view(at::kComplexDouble).clone(at::MemoryFormat::Contiguous).view(part.scalar_type());
}

// What is not differentiated: no arguments of the node, whose backward has a gradient for each.
struct MergedOptions {
  int64_t recipe;
  const OptionalTensors& biases;  // those that are there are arguments of the node
  const OptionalTensor& history;
};

// Arguments of the node: x, the weights, the biases that are there, the options.
class MergedLinear : public torch::autograd::Function<MergedLinear> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList weights,
                               at::TensorList /*biases*/, const MergedOptions* options) {
    const Range range("fp8::merged_linear");
    ctx->set_materialize_grads(false);
    const auto wants = [](const at::Tensor& t) { return t.requires_grad(); };
    const bool dx = x.requires_grad();
    const bool dweight = std::any_of(weights.begin(), weights.end(), wants);
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<decltype(kernel::_merged_forward)>("fp8::_merged_forward");
    std::optional<memory::EagerScope> shares_input;
    if (!x.is_leaf()) shares_input.emplace();
    const auto [y, x_t, x_t_scale, weight_amax] =
        op.call(x, weights, merged::joined_bias(weights, options->biases), options->recipe, dweight,
                dx, options->history);
    count_write(options->history);

    const Recipe recipe = recipe_at(options->recipe);
    const bool keeps_amax = dx && recipe.granularity == core::Granularity::kTensorwise;
    const at::Tensor none;
    variable_list saved{dweight ? (recipe.fp8_wgrad ? x_t : x) : none,
                        dweight && recipe.fp8_wgrad ? x_t_scale : none,
                        keeps_amax ? weight_amax : none};
    std::vector<int64_t> bias_at;  // of each weight, the number of its bias among the arguments
    int64_t next = 1 + static_cast<int64_t>(weights.size());
    std::vector<int64_t> flags;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (dx) saved.push_back(weights[i]);
      const OptionalTensor bias = merged::bias_of(options->biases, i);
      bias_at.push_back(bias ? next++ : 0);
      flags.push_back((weights[i].requires_grad() ? kWeight : 0) | (wants_grad(bias) ? kBias : 0));
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["dx"] = dx;
    ctx->saved_data["flags"] = flags;
    ctx->saved_data["bias_at"] = bias_at;
    ctx->saved_data["recipe"] = options->recipe;
    ctx->saved_data["in_features"] = x.sym_size(-1);
    // No saved tensor: it is meant to change between the passes.
    if (options->history) ctx->saved_data["history"] = *options->history;
    variable_list parts = merged::parts_of(y, weights);
    for (at::Tensor& part : parts) {
      if (is_small(part, y)) part = copied(part);
    }
    return parts;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Range range("fp8::merged_linear backward");
    const auto flags = ctx->saved_data["flags"].toIntVector();
    const auto bias_at = ctx->saved_data["bias_at"].toIntVector();
    const int64_t count = static_cast<int64_t>(flags.size());
    const int64_t arguments =
        1 +
        std::max(count, bias_at.empty() ? 0 : *std::max_element(bias_at.begin(), bias_at.end()));
    variable_list result(arguments + 1);  // and the options
    const variable_list saved = ctx->get_saved_variables();
    const bool dx_foreseen = ctx->saved_data["dx"].toBool();
    const bool dx = dx_foreseen && ctx->needs_input_grad(0);
    // What this backward is for, of what the forward could foresee. A part stays even if nothing of
    // it is asked for: its gradient has a share in the scale, whatever the backward is for.
    std::vector<at::Tensor> dys;
    std::vector<at::Tensor> weights;
    std::vector<int64_t> parts;
    int64_t needs_dweight = 0;
    bool needs_dbias = false;
    for (int64_t i = 0; i < count; ++i) {
      if (!grads[i].defined()) continue;
      const bool dweight = (flags[i] & kWeight) != 0 && ctx->needs_input_grad(1 + i);
      const bool dbias = (flags[i] & kBias) != 0 && ctx->needs_input_grad(bias_at[i]);
      if (!dx_foreseen && flags[i] == 0) continue;
      if (dweight) needs_dweight |= int64_t{1} << parts.size();
      needs_dbias = needs_dbias || dbias;
      parts.push_back(i);
      dys.push_back(grads[i]);
      if (dx) weights.push_back(saved[3 + i]);
    }
    if (parts.empty()) return result;
    OptionalTensor history;
    const auto found = ctx->saved_data.find("history");
    if (found != ctx->saved_data.end()) history = found->second.toTensor();
    static const auto op = find<decltype(kernel::_merged_backward)>("fp8::_merged_backward");
    const auto [gx, gweight, gbias] =
        op.call(dys, optional(saved[0]), optional(saved[1]), weights, optional(saved[2]),
                ctx->saved_data["in_features"].toSymInt(), ctx->saved_data["recipe"].toInt(), dx,
                needs_dweight, needs_dbias, history);
    if (dx) result[0] = gx;
    c10::SymInt row = 0;
    c10::SymInt column = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      const int64_t part = parts[i];
      const c10::SymInt features = dys[i].sym_size(-1);
      if (((needs_dweight >> i) & 1) != 0) {
        result[1 + part] = gweight.narrow_symint(0, row, features);
        row = row + features;
      }
      if ((flags[part] & kBias) != 0 && ctx->needs_input_grad(bias_at[part])) {
        result[bias_at[part]] = gbias.narrow_symint(0, column, features);
      }
      column = column + features;
    }
    return result;
  }

 private:
  static constexpr int64_t kWeight = 1;
  static constexpr int64_t kBias = 2;
};

bool has_tangent(const at::Tensor& t) { return t._fw_grad(0).defined(); }

}  // namespace

std::vector<at::Tensor> merged_linear(const at::Tensor& x, at::TensorList weights,
                                      const OptionalTensors& biases, std::string_view recipe,
                                      const OptionalTensor& history) {
  const int64_t id = recipe_id(recipe);
  std::vector<at::Tensor> present;
  for (size_t i = 0; biases && i < biases->size(); ++i) {
    const OptionalTensor bias = biases->get(i);
    if (bias) present.push_back(*bias);
  }
  bool tangent = has_tangent(x);
  bool needed = x.requires_grad();
  for (const at::TensorList list : {weights, at::TensorList(present)}) {
    for (const at::Tensor& t : list) {
      tangent = tangent || has_tangent(t);
      needed = needed || t.requires_grad();
    }
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!tangent,
                              "fp8::merged_linear: expected reverse mode, got a tangent: "
                              "forward-mode AD (jvp) is not supported; use nn.Linear there");
  check_merged(x, weights, biases, id, history);
  if (at::GradMode::is_enabled() && needed) {
    const MergedOptions options{id, biases, history};
    return MergedLinear::apply(x, weights, at::TensorList(present), &options);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  static const auto op = find<decltype(composite::merged_linear)>("fp8::merged_linear");
  std::vector<at::Tensor> parts = op.call(x, weights, biases, recipe, history);
  count_write(history);
  return parts;
}

}  // namespace fp8::autograd

namespace fp8::in_place {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _merged_forward(
    const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& bias,
    int64_t recipe, bool save_x_t, bool save_weight_amax,
    const std::optional<at::Tensor>& history) {
  static const auto op = find<decltype(kernel::_merged_forward)>("fp8::_merged_forward");
  const at::AutoDispatchBelowADInplaceOrView below;
  auto made = op.call(x, weights, bias, recipe, save_x_t, save_weight_amax, history);
  count_write(history);
  return made;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _merged_backward(
    at::TensorList dys, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& x_t_scale, at::TensorList weights,
    const std::optional<at::Tensor>& weight_amax, c10::SymInt in_features, int64_t recipe,
    bool needs_dx, int64_t needs_dweight, bool needs_dbias,
    const std::optional<at::Tensor>& history) {
  static const auto op = find<decltype(kernel::_merged_backward)>("fp8::_merged_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  auto made = op.call(dys, x, x_t_scale, weights, weight_amax, std::move(in_features), recipe,
                      needs_dx, needs_dweight, needs_dbias, history);
  count_write(history);
  return made;
}

}  // namespace fp8::in_place
