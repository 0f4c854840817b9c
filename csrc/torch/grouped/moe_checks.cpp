// What moe_experts accepts, and the shapes of what it gives: the part that needs no data.
#include <ATen/ATen.h>

#include "fp8/core_grouped.h"
#include "torch/common/main_grad.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/grouped/grouped_ops.h"
#include "torch/grouped/operands.h"

namespace fp8 {
namespace {

constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh", "clamped_silu"};

}  // namespace

int64_t activation_index(std::string_view name, const char* op) {
  std::string known;
  for (int64_t i = 0; i < 4; ++i) {
    if (name == kActivations[i]) return i;
    known += std::string(known.empty() ? "'" : ", '") + kActivations[i] + "'";
  }
  FP8_CHECK_VALUE(false, "fp8::", op, ": expected an activation out of ", known, ", got '", name,
                  "'");
}

void check_mixture(const char* op, const at::Tensor& x, const at::Tensor& top_k_index,
                   const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                   const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,
                   const std::optional<at::Tensor>& down_bias) {
  FP8_CHECK_HIGH_PRECISION(op, "x", x);
  FP8_CHECK_HIGH_PRECISION(op, "top_k_weights", top_k_weights);
  FP8_CHECK_TYPE(top_k_index.scalar_type() == at::kLong, "fp8::", op,
                 ": expected top_k_index in int64, got ", top_k_index.scalar_type());
  FP8_CHECK_VALUE(x.dim() == 2, "fp8::", op, ": expected x [T, H], got shape ", x.sym_sizes());
  FP8_CHECK_VALUE(top_k_index.dim() == 2 && top_k_index.sym_size(0) == x.sym_size(0), "fp8::", op,
                  ": expected top_k_index [T, k] with T = ", x.sym_size(0), ", got shape ",
                  top_k_index.sym_sizes());
  FP8_CHECK_VALUE(top_k_weights.sym_sizes() == top_k_index.sym_sizes(), "fp8::", op,
                  ": expected top_k_weights of top_k_index's shape ", top_k_index.sym_sizes(),
                  ", got ", top_k_weights.sym_sizes());
  FP8_CHECK_VALUE(down.dim() == 3 && down.sym_size(1) == x.sym_size(1), "fp8::", op,
                  ": expected down [E, H, I] with H = ", x.sym_size(1), ", got shape ",
                  down.sym_sizes());
  FP8_CHECK_VALUE(gate_up.dim() == 3 && gate_up.sym_size(0) == down.sym_size(0) &&
                      gate_up.sym_size(1) == 2 * down.sym_size(2) &&
                      gate_up.sym_size(2) == x.sym_size(1),
                  "fp8::", op, ": expected gate_up [E, 2 I, H] = [", down.sym_size(0), ", ",
                  2 * down.sym_size(2), ", ", x.sym_size(1), "], got ", gate_up.sym_sizes());
  FP8_CHECK_VALUE(down.sym_size(0) >= 1 && down.sym_size(0) <= core::kMaxGroups, "fp8::", op,
                  ": expected 1 to ", core::kMaxGroups, " experts, got ", down.sym_size(0));
  FP8_CHECK_VALUE(x.sym_size(1) > 0 && x.sym_size(1) % 16 == 0 && down.sym_size(2) > 0 &&
                      down.sym_size(2) % 16 == 0,
                  "fp8::", op,
                  ": expected H and I that are multiples of 16, got H = ", x.sym_size(1),
                  ", I = ", down.sym_size(2), " (grouped_linear takes any)");
  FP8_CHECK_SAME_DEVICE(op, "gate_up", gate_up, "x", x);
  FP8_CHECK_SAME_DEVICE(op, "down", down, "x", x);
  FP8_CHECK_SAME_DEVICE(op, "top_k_index", top_k_index, "x", x);
  FP8_CHECK_SAME_DEVICE(op, "top_k_weights", top_k_weights, "x", x);
  const auto check_bias = [&](const char* name, const std::optional<at::Tensor>& bias,
                              const at::Tensor& weight) {
    if (!bias) return;
    FP8_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), "fp8::", op, ": expected ", name,
                   " in x's dtype ", x.scalar_type(), ", got ", bias->scalar_type());
    FP8_CHECK_SAME_DEVICE(op, name, *bias, "x", x);
    FP8_CHECK_VALUE(bias->dim() == 2 && bias->sym_size(0) == weight.sym_size(0) &&
                        bias->sym_size(1) == weight.sym_size(1),
                    "fp8::", op, ": expected ", name, " of shape [", weight.sym_size(0), ", ",
                    weight.sym_size(1), "], got ", bias->sym_sizes());
  };
  check_bias("gate_up_bias", gate_up_bias, gate_up);
  check_bias("down_bias", down_bias, down);
}

void check_moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                       const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                       const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,
                       const std::optional<at::Tensor>& down_bias) {
  check_mixture("moe_experts", x, top_k_index, top_k_weights, gate_up, down, gate_up_bias,
                down_bias);
  const auto check_dtype = [&](const char* name, const at::Tensor& weight) {
    FP8_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "fp8::moe_experts: expected ", name,
                   " in x's dtype ", x.scalar_type(), ", got ", weight.scalar_type());
  };
  check_dtype("gate_up", gate_up);
  check_dtype("down", down);
}

void check_moe_main_grads(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
                          const std::optional<at::Tensor>& gate_up_main_grad,
                          const std::optional<at::Tensor>& down_main_grad) {
  const auto check = [&](const char* name, const std::optional<at::Tensor>& main_grad,
                         const at::Tensor& weight) {
    if (main_grad) check_main_grad("moe_experts", name, *main_grad, weight.sym_sizes(), x);
  };
  check("gate_up_main_grad", gate_up_main_grad, gate_up);
  check("down_main_grad", down_main_grad, down);
}

namespace meta {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_moe_forward(const at::Tensor& x, const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
             const at::Tensor& gate_up, const at::Tensor& down,
             const std::optional<at::Tensor>& gate_up_bias,
             const std::optional<at::Tensor>& down_bias, int64_t /*activation*/,
             bool /*interleaved*/, double /*alpha*/, double /*limit*/, int64_t recipe_id,
             bool save_amax) {
  check_moe_experts(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias);
  const Recipe recipe = grouped_recipe_at(recipe_id);
  const c10::SymInt rows = top_k_index.sym_numel();
  const auto ints = x.options().dtype(at::kInt);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint({rows, gate_up.sym_size(1)}, x.options()),
          at::empty_symint({gate_up.sym_size(0)}, ints),
          at::empty_symint({rows}, ints),
          at::empty_symint({rows}, ints),
          save_amax ? grouped::kept_amax_like(gate_up, recipe) : none_like(x),
          save_amax ? grouped::kept_amax_like(down, recipe) : none_like(x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _moe_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& top_k_index,
    const at::Tensor& /*top_k_weights*/, const at::Tensor& gate_up, const at::Tensor& down,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    const at::Tensor& /*gate_up_out*/, const at::Tensor& /*offsets*/, const at::Tensor& /*place*/,
    const at::Tensor& /*source*/, int64_t /*activation*/, bool /*interleaved*/, double /*alpha*/,
    double /*limit*/, int64_t /*recipe*/, int64_t wanted,
    const std::optional<at::Tensor>& /*gate_up_amax*/,
    const std::optional<at::Tensor>& /*down_amax*/,
    const std::optional<at::Tensor>& gate_up_main_grad,
    const std::optional<at::Tensor>& down_main_grad) {
  check_moe_main_grads(x, gate_up, down, gate_up_main_grad, down_main_grad);
  const auto like = [&](int64_t what, const at::Tensor& t) {
    return (wanted & what) != 0 ? at::empty_symint(t.sym_sizes(), t.options()) : none_like(dy);
  };
  const auto stored_like = [&](int64_t what, const at::Tensor& t) {
    if ((wanted & what) == 0 || !is_stored_transposed(t)) return like(what, t);
    return at::empty_symint(t.transpose(1, 2).sym_sizes(), t.options()).transpose(1, 2);
  };
  return {like(needs::kX, x),
          (wanted & needs::kWeights) != 0
              ? at::empty_symint(top_k_index.sym_sizes(), dy.options().dtype(at::kFloat))
              : none_like(dy),
          gate_up_main_grad ? none_like(dy) : stored_like(needs::kGateUp, gate_up),
          down_main_grad ? none_like(dy) : stored_like(needs::kDown, down),
          gate_up_bias ? like(needs::kGateUpBias, *gate_up_bias) : none_like(dy),
          down_bias ? like(needs::kDownBias, *down_bias) : none_like(dy)};
}

}  // namespace meta

}  // namespace fp8
