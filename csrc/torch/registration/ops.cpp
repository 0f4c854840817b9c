// The typed C++ functions of fp8/ops.h: each looks its operator up once and calls it through the
// dispatcher.
#include "fp8/ops.h"

#include <ATen/ATen.h>

#include "fp8/core.h"
#include "torch/common/operators.h"
#include "torch/experts/experts_frozen.h"
#include "torch/frozen/frozen.h"
#include "torch/grouped/grouped_mm_op.h"
#include "torch/grouped/grouped_ops.h"
#include "torch/linear/linear.h"
#include "torch/matmul/scaled_mm.h"
#include "torch/merged/merged.h"
#include "torch/mlp/mlp.h"
#include "torch/norm/norm_ops.h"
#include "torch/quantize/quantize_ops.h"
#include "torch/rope/rope_ops.h"

namespace fp8 {

std::tuple<at::Tensor, at::Tensor> quantize_tensorwise(const at::Tensor& x, at::ScalarType dtype,
                                                       const std::optional<at::Tensor>& scale,
                                                       bool power_of_two) {
  static const auto op = find<decltype(kernel::quantize_tensorwise)>("fp8::quantize_tensorwise");
  return op.call(x, dtype, scale, power_of_two);
}

std::tuple<at::Tensor, at::Tensor> quantize_rowwise(const at::Tensor& x, at::ScalarType dtype,
                                                    bool power_of_two) {
  static const auto op = find<decltype(kernel::quantize_rowwise)>("fp8::quantize_rowwise");
  return op.call(x, dtype, power_of_two);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_tensorwise_transpose(
    const at::Tensor& x, at::ScalarType dtype, const std::optional<at::Tensor>& scale,
    bool power_of_two) {
  static const auto op =
      find<decltype(kernel::quantize_tensorwise_transpose)>("fp8::quantize_tensorwise_transpose");
  return op.call(x, dtype, scale, power_of_two);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_rowwise_transpose(
    const at::Tensor& x, at::ScalarType dtype, bool power_of_two) {
  static const auto op =
      find<decltype(kernel::quantize_rowwise_transpose)>("fp8::quantize_rowwise_transpose");
  return op.call(x, dtype, power_of_two);
}

std::tuple<at::Tensor, at::Tensor> quantize_blockwise_1x128(const at::Tensor& x,
                                                            at::ScalarType dtype,
                                                            bool power_of_two) {
  static const auto op =
      find<decltype(kernel::quantize_blockwise_1x128)>("fp8::quantize_blockwise_1x128");
  return op.call(x, dtype, power_of_two);
}

std::tuple<at::Tensor, at::Tensor> quantize_blockwise_128x128(const at::Tensor& x,
                                                              at::ScalarType dtype,
                                                              bool power_of_two) {
  static const auto op =
      find<decltype(kernel::quantize_blockwise_128x128)>("fp8::quantize_blockwise_128x128");
  return op.call(x, dtype, power_of_two);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_1x128_transpose(
    const at::Tensor& x, at::ScalarType dtype, bool power_of_two) {
  static const auto op = find<decltype(kernel::quantize_blockwise_1x128_transpose)>(
      "fp8::quantize_blockwise_1x128_transpose");
  return op.call(x, dtype, power_of_two);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_128x128_transpose(
    const at::Tensor& x, at::ScalarType dtype, bool power_of_two) {
  static const auto op = find<decltype(kernel::quantize_blockwise_128x128_transpose)>(
      "fp8::quantize_blockwise_128x128_transpose");
  return op.call(x, dtype, power_of_two);
}

at::Tensor dequantize(const at::Tensor& data, const at::Tensor& scale, at::ScalarType dtype) {
  static const auto op = find<decltype(kernel::dequantize)>("fp8::dequantize");
  return op.call(data, scale, dtype);
}

at::Tensor scaled_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                     const at::Tensor& scale_b, const std::optional<at::Tensor>& bias,
                     at::ScalarType out_dtype, bool fast_accum) {
  static const auto op = find<decltype(kernel::scaled_mm)>("fp8::scaled_mm");
  return op.call(a, b, scale_a, scale_b, bias, out_dtype, fast_accum);
}

at::Tensor& scaled_mm_accumulate_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                                  const at::Tensor& scale_a, const at::Tensor& scale_b,
                                  bool fast_accum) {
  static const auto op =
      find<decltype(kernel::scaled_mm_accumulate_)>("fp8::scaled_mm_accumulate_");
  return op.call(out, a, b, scale_a, scale_b, fast_accum);
}

at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, std::string_view recipe,
                        const std::optional<at::Tensor>& input_scale,
                        const std::optional<at::Tensor>& history) {
  static const auto op = find<decltype(composite::fused_linear)>("fp8::fused_linear");
  return op.call(x, weight, bias, recipe, input_scale, history);
}

at::Tensor fused_linear_into(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, std::string_view recipe,
                             const at::Tensor& main_grad, bool overwrite,
                             const std::optional<at::Tensor>& input_scale,
                             const std::optional<at::Tensor>& history) {
  static const auto op = find<decltype(composite::_fused_linear_into)>("fp8::_fused_linear_into");
  return op.call(x, weight, bias, recipe, main_grad, overwrite, /*stand_in=*/std::nullopt,
                 input_scale, history);
}

at::Tensor linear_frozen(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& input_scale,
                         std::optional<std::string_view> input_granularity, bool power_of_two,
                         bool decode) {
  static const auto op = find<decltype(kernel::linear_frozen)>("fp8::linear_frozen");
  return op.call(x, weight, weight_scale, bias, input_scale, input_granularity, power_of_two,
                 decode);
}

std::vector<at::Tensor> merged_linear(const at::Tensor& x, at::ArrayRef<at::Tensor> weights,
                                      at::ArrayRef<std::optional<at::Tensor>> biases,
                                      std::string_view recipe,
                                      const std::optional<at::Tensor>& history) {
  static const auto op = find<decltype(composite::merged_linear)>("fp8::merged_linear");
  OptionalTensors given;
  if (!biases.empty()) given.emplace(biases);
  return op.call(x, weights, given, recipe, history);
}

at::Tensor make_history(const at::TensorOptions& options) {
  return at::zeros({3, core::kAmaxHistorySize}, options.dtype(at::kInt));
}

at::Tensor mlp(const at::Tensor& x, const at::Tensor& gate, const std::optional<at::Tensor>& up,
               const at::Tensor& down, const MlpOptions& options) {
  static const auto op = find<decltype(composite::mlp)>("fp8::mlp");
  return op.call(x, gate, up, down, options.activation, options.recipe, options.gate_bias,
                 options.up_bias, options.down_bias, options.save, options.gate_second,
                 options.alpha, options.limit, options.gate_history, options.up_history,
                 options.down_history);
}

at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                      const at::Tensor& scale_b, const at::Tensor& offsets,
                      at::ScalarType out_dtype, bool fast_accum) {
  static const auto op = find<decltype(kernel::grouped_mm)>("fp8::grouped_mm");
  return op.call(a, b, scale_a, scale_b, offsets, out_dtype, fast_accum);
}

at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets,
                          const std::optional<at::Tensor>& bias, std::string_view recipe) {
  static const auto op = find<decltype(composite::grouped_linear)>("fp8::grouped_linear");
  return op.call(x, weight, offsets, bias, recipe);
}

at::Tensor moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                       const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                       const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,
                       const std::optional<at::Tensor>& down_bias, std::string_view activation,
                       bool interleaved, double alpha, double limit, std::string_view recipe) {
  static const auto op = find<decltype(composite::moe_experts)>("fp8::moe_experts");
  return op.call(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias, activation,
                 interleaved, alpha, limit, recipe);
}

at::Tensor experts_frozen(const at::Tensor& x, const at::Tensor& top_k_index,
                          const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                          const at::Tensor& gate_up_scale, const at::Tensor& down,
                          const at::Tensor& down_scale, const ExpertsFrozenOptions& options) {
  static const auto op = find<decltype(composite::experts_frozen)>("fp8::experts_frozen");
  return op.call(x, top_k_index, top_k_weights, gate_up, gate_up_scale, down, down_scale,
                 options.gate_up_bias, options.down_bias, options.activation, options.interleaved,
                 options.alpha, options.limit, options.input_granularity, options.power_of_two);
}

at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                    std::optional<double> eps, std::string_view form) {
  static const auto op = find<decltype(composite::rms_norm)>("fp8::rms_norm");
  return op.call(x, weight, eps, form);
}

at::Tensor layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, double eps) {
  static const auto op = find<decltype(composite::layer_norm)>("fp8::layer_norm");
  return op.call(x, weight, bias, eps);
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const std::optional<at::Tensor>& weight,
                                                std::optional<double> eps, std::string_view form) {
  static const auto op = find<decltype(composite::add_rms_norm)>("fp8::add_rms_norm");
  return op.call(x, residual, weight, eps, form);
}

std::tuple<at::Tensor, at::Tensor> rope(const at::Tensor& q, const std::optional<at::Tensor>& k,
                                        const at::Tensor& cos, const at::Tensor& sin,
                                        std::string_view layout, std::optional<int64_t> rotary_dim,
                                        std::string_view rounding) {
  static const auto op = find<decltype(composite::rope)>("fp8::rope");
  return op.call(q, k, cos, sin, layout,
                 rotary_dim ? std::optional<c10::SymInt>(*rotary_dim) : std::nullopt, rounding);
}

void ensure_registered() { find<decltype(composite::fused_linear)>("fp8::fused_linear"); }

}  // namespace fp8
