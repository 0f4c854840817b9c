// What mlp refuses, for every device and for fake tensors alike.
#include <array>

#include "fp8/core.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/mlp/mlp.h"

namespace fp8 {
namespace {

// As mlp_node::Activation counts them. A new one: a struct in core/mlp/activations.cuh, a case in
// torch/mlp/unit.cpp, and its name here.
constexpr std::array<std::string_view, 6> kActivations{"silu", "gelu",         "gelu_tanh",
                                                       "relu", "relu_squared", "clamped_silu"};
constexpr int64_t kClampedSilu = 5;

using OptionalTensor = std::optional<at::Tensor>;

void check_operand(const char* name, const at::Tensor& t, const at::Tensor& x) {
  FP8_CHECK_TYPE(t.scalar_type() == x.scalar_type(), "fp8::mlp: expected ", name, " in x's dtype ",
                 x.scalar_type(), ", got ", t.scalar_type());
  FP8_CHECK_SAME_DEVICE("mlp", name, t, "x", x);
}

void check_bias(const char* name, const OptionalTensor& bias, const c10::SymInt& features,
                const at::Tensor& x) {
  if (!bias) return;
  check_operand(name, *bias, x);
  FP8_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == features, "fp8::mlp: expected ", name,
                  " of shape [", features, "], got ", bias->sym_sizes());
}

void check_history(const char* name, const OptionalTensor& history, const Recipe& recipe,
                   const at::Tensor& x) {
  if (!history) return;
  FP8_CHECK_VALUE(recipe.delayed, "fp8::mlp: expected the recipe 'delayed' with ", name, ", got '",
                  recipe.name, "'");
  FP8_CHECK_TYPE(history->scalar_type() == at::kInt, "fp8::mlp: expected ", name,
                 " in int32, as make_history gives it, got ", history->scalar_type());
  FP8_CHECK_VALUE(history->dim() == 2 && history->sym_size(0) == 3 &&
                      history->sym_size(1) == core::kAmaxHistorySize && history->is_contiguous(),
                  "fp8::mlp: expected ", name, " contiguous, of shape [3, ", core::kAmaxHistorySize,
                  "], as make_history gives it, got shape ", history->sym_sizes(), ", strides ",
                  history->sym_strides());
  FP8_CHECK_SAME_DEVICE("mlp", name, *history, "x", x);
}

}  // namespace

int64_t mlp_node::activation_index(std::string_view name) {
  std::string known;
  for (size_t i = 0; i < kActivations.size(); ++i) {
    if (name == kActivations[i]) return static_cast<int64_t>(i);
    known += join(known.empty() ? "'" : ", '", kActivations[i], "'");
  }
  FP8_CHECK_VALUE(false, "fp8::mlp: expected an activation out of ", known, ", got '", name, "'");
}

int64_t mlp_node::save_bit(std::string_view save) {
  FP8_CHECK_VALUE(save == "bf16" || save == "fp8" || save == "recompute",
                  "fp8::mlp: expected save 'bf16', 'fp8' or 'recompute', got '", save, "'");
  if (save == "fp8") return mlp_needs::kFp8;
  return save == "recompute" ? mlp_needs::kRecompute : 0;
}

mlp_node::Form mlp_node::form_of(const at::Tensor& gate, const OptionalTensor& up,
                                 const at::Tensor& down) {
  if (up) return Form::kSeparate;
  const c10::SymInt features = down.sym_size(1);
  return gate.sym_size(0) == 2 * features && features > 0 ? Form::kMerged : Form::kPlain;
}

void check_mlp(const at::Tensor& x, const at::Tensor& gate, const OptionalTensor& up,
               const at::Tensor& down, const OptionalTensor& gate_bias,
               const OptionalTensor& up_bias, const OptionalTensor& down_bias, int64_t activation,
               int64_t recipe, const OptionalTensor& gate_history, const OptionalTensor& up_history,
               const OptionalTensor& down_history) {
  FP8_CHECK_HIGH_PRECISION("mlp", "x", x);
  FP8_CHECK_VALUE(x.dim() >= 1, "fp8::mlp: expected x of at least one dimension, got a scalar");
  check_operand("gate", gate, x);
  if (up) check_operand("up", *up, x);
  check_operand("down", down, x);
  FP8_CHECK_VALUE(down.dim() == 2, "fp8::mlp: expected down [H, I], got shape ", down.sym_sizes());
  const c10::SymInt features = down.sym_size(1);
  FP8_CHECK_VALUE(gate.dim() == 2 && gate.sym_size(1) == x.sym_size(-1),
                  "fp8::mlp: expected gate [I, K] with x's K = ", x.sym_size(-1), ", got shape ",
                  gate.sym_sizes());
  if (up) {
    FP8_CHECK_VALUE(gate.sym_size(0) == features && up->sym_sizes() == gate.sym_sizes(),
                    "fp8::mlp: expected gate and up [I, K] with down's I = ", features,
                    ", got gate=", gate.sym_sizes(), ", up=", up->sym_sizes());
  } else {
    FP8_CHECK_VALUE(gate.sym_size(0) == features || gate.sym_size(0) == 2 * features,
                    "fp8::mlp: expected gate [2 I, K], merged, or [I, K], plain, with down's I = ",
                    features, ", got ", gate.sym_sizes());
    FP8_CHECK_VALUE(!up_bias, "fp8::mlp: expected no up_bias without up");
    FP8_CHECK_VALUE(!up_history, "fp8::mlp: expected no up_history without up");
  }
  FP8_CHECK_VALUE(
      activation != kClampedSilu || mlp_node::form_of(gate, up, down) != mlp_node::Form::kPlain,
      "fp8::mlp: expected gates for 'clamped_silu', got a plain MLP: gate=", gate.sym_sizes(),
      ", down=", down.sym_sizes());
  check_bias("gate_bias", gate_bias, gate.sym_size(0), x);
  check_bias("up_bias", up_bias, features, x);
  check_bias("down_bias", down_bias, down.sym_size(0), x);
  const Recipe table = recipe_at(recipe);
  check_history("gate_history", gate_history, table, x);
  check_history("up_history", up_history, table, x);
  check_history("down_history", down_history, table, x);
}

}  // namespace fp8
