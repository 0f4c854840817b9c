// Autocast: inside torch.autocast, linear operators take x, weights and biases in the autocast
// dtype, as F.linear does, and LayerNorm in fp32. A static scale stays fp32, a history as it is.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "fp8/ops.h"
#include "torch/common/operators.h"
#include "torch/common/recipe.h"
#include "torch/experts/experts_frozen.h"
#include "torch/frozen/frozen.h"
#include "torch/grouped/grouped_ops.h"
#include "torch/linear/linear.h"
#include "torch/merged/merged.h"
#include "torch/mlp/mlp.h"

namespace fp8::autocast {
namespace {

template <at::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, std::string_view recipe,
                        const std::optional<at::Tensor>& input_scale,
                        const std::optional<at::Tensor>& history) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  return fp8::fused_linear(at::autocast::cached_cast(dtype, x, kDevice),
                           at::autocast::cached_cast(dtype, weight, kDevice),
                           at::autocast::cached_cast(dtype, bias, kDevice), recipe, input_scale,
                           history);
}

template <at::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor _fused_linear_into(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, std::string_view recipe,
                              const at::Tensor& main_grad, bool overwrite,
                              const std::optional<at::Tensor>& stand_in,
                              const std::optional<at::Tensor>& input_scale,
                              const std::optional<at::Tensor>& history) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  static const auto op = find<decltype(composite::_fused_linear_into)>("fp8::_fused_linear_into");
  return op.call(at::autocast::cached_cast(dtype, x, kDevice),
                 at::autocast::cached_cast(dtype, weight, kDevice),
                 at::autocast::cached_cast(dtype, bias, kDevice), recipe, main_grad, overwrite,
                 stand_in, input_scale, history);
}

// The weight is FP8, and stays it.
template <at::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor linear_frozen(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& input_scale,
                         std::optional<std::string_view> input_granularity, bool power_of_two,
                         bool decode) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  static const auto op = find<decltype(kernel::linear_frozen)>("fp8::linear_frozen");
  return op.call(at::autocast::cached_cast(dtype, x, kDevice), weight, weight_scale,
                 at::autocast::cached_cast(dtype, bias, kDevice), input_scale, input_granularity,
                 power_of_two, decode);
}

template <at::DeviceType kDevice, c10::DispatchKey kKey>
std::vector<at::Tensor> merged_linear(const at::Tensor& x, at::TensorList weights,
                                      const OptionalTensors& biases, std::string_view recipe,
                                      const std::optional<at::Tensor>& history) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  std::vector<at::Tensor> cast_weights;
  for (const at::Tensor& weight : weights) cast_weights.push_back(cast(weight));
  OptionalTensors cast_biases;
  if (biases) cast_biases.emplace();
  for (size_t i = 0; biases && i < biases->size(); ++i) {
    cast_biases->push_back(cast(biases->get(i)));
  }
  static const auto op = find<decltype(composite::merged_linear)>("fp8::merged_linear");
  return op.call(cast(x), cast_weights, cast_biases, recipe, history);
}

template <at::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets,
                          const std::optional<at::Tensor>& bias, std::string_view recipe) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  return fp8::grouped_linear(at::autocast::cached_cast(dtype, x, kDevice),
                             at::autocast::cached_cast(dtype, weight, kDevice), offsets,
                             at::autocast::cached_cast(dtype, bias, kDevice), recipe);
}

template <at::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                       const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                       const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,
                       const std::optional<at::Tensor>& down_bias, std::string_view activation,
                       bool interleaved, double alpha, double limit, std::string_view recipe) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  return fp8::moe_experts(cast(x), top_k_index, top_k_weights, cast(gate_up), cast(down),
                          cast(gate_up_bias), cast(down_bias), activation, interleaved, alpha,
                          limit, recipe);
}

// The weights are FP8, and stay it.
template <at::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor experts_frozen(const at::Tensor& x, const at::Tensor& top_k_index,
                          const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                          const at::Tensor& gate_up_scale, const at::Tensor& down,
                          const at::Tensor& down_scale,
                          const std::optional<at::Tensor>& gate_up_bias,
                          const std::optional<at::Tensor>& down_bias, std::string_view activation,
                          bool interleaved, double alpha, double limit,
                          std::optional<std::string_view> input_granularity, bool power_of_two) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  static const auto op = find<decltype(composite::experts_frozen)>("fp8::experts_frozen");
  return op.call(cast(x), top_k_index, top_k_weights, gate_up, gate_up_scale, down, down_scale,
                 cast(gate_up_bias), cast(down_bias), activation, interleaved, alpha, limit,
                 input_granularity, power_of_two);
}

template <at::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor _grouped_linear_into(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                                std::string_view recipe, const at::Tensor& main_grad,
                                bool overwrite, const std::optional<at::Tensor>& stand_in) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  static const auto op =
      find<decltype(composite::_grouped_linear_into)>("fp8::_grouped_linear_into");
  return op.call(at::autocast::cached_cast(dtype, x, kDevice),
                 at::autocast::cached_cast(dtype, weight, kDevice), offsets,
                 at::autocast::cached_cast(dtype, bias, kDevice), recipe, main_grad, overwrite,
                 stand_in);
}

template <at::DeviceType kDevice, c10::DispatchKey kKey>
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
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  static const auto op = find<decltype(composite::_moe_experts_into)>("fp8::_moe_experts_into");
  return op.call(cast(x), top_k_index, top_k_weights, cast(gate_up), cast(down), cast(gate_up_bias),
                 cast(down_bias), activation, interleaved, alpha, limit, recipe, gate_up_main_grad,
                 down_main_grad, overwrite_gate_up, overwrite_down, gate_up_stand_in,
                 down_stand_in);
}

// In fp32, as F.layer_norm on a GPU. RMSNorm takes tensors as they are, and so do both on the CPU.
at::Tensor layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, double eps) {
  const c10::impl::ExcludeDispatchKeyGuard outside(c10::DispatchKey::AutocastCUDA);
  const auto cast = [](const auto& t) {
    return at::autocast::cached_cast(at::kFloat, t, at::kCUDA);
  };
  return fp8::layer_norm(cast(x), cast(weight), cast(bias), eps);
}

template <at::DeviceType kDevice, c10::DispatchKey kKey>
at::Tensor mlp(const at::Tensor& x, const at::Tensor& gate, const std::optional<at::Tensor>& up,
               const at::Tensor& down, std::string_view activation, std::string_view recipe,
               const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& up_bias,
               const std::optional<at::Tensor>& down_bias, std::string_view save, bool gate_second,
               double alpha, double limit, const std::optional<at::Tensor>& gate_history,
               const std::optional<at::Tensor>& up_history,
               const std::optional<at::Tensor>& down_history) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kKey);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  static const auto op = find<decltype(composite::mlp)>("fp8::mlp");
  return op.call(cast(x), cast(gate), cast(up), cast(down), activation, recipe, cast(gate_bias),
                 cast(up_bias), cast(down_bias), save, gate_second, alpha, limit, gate_history,
                 up_history, down_history);
}

template <at::DeviceType kDevice, c10::DispatchKey kKey>
void register_kernels(torch::Library& m) {
  m.impl("fused_linear", TORCH_FN((fused_linear<kDevice, kKey>)));
  m.impl("_fused_linear_into", TORCH_FN((_fused_linear_into<kDevice, kKey>)));
  m.impl("linear_frozen", TORCH_FN((linear_frozen<kDevice, kKey>)));
  m.impl("merged_linear", TORCH_FN((merged_linear<kDevice, kKey>)));
  m.impl("grouped_linear", TORCH_FN((grouped_linear<kDevice, kKey>)));
  m.impl("moe_experts", TORCH_FN((moe_experts<kDevice, kKey>)));
  m.impl("experts_frozen", TORCH_FN((experts_frozen<kDevice, kKey>)));
  m.impl("_grouped_linear_into", TORCH_FN((_grouped_linear_into<kDevice, kKey>)));
  m.impl("_moe_experts_into", TORCH_FN((_moe_experts_into<kDevice, kKey>)));
  m.impl("mlp", TORCH_FN((mlp<kDevice, kKey>)));
}

}  // namespace
}  // namespace fp8::autocast

TORCH_LIBRARY_IMPL(fp8, AutocastCUDA, m) {
  fp8::autocast::register_kernels<at::kCUDA, c10::DispatchKey::AutocastCUDA>(m);
  m.impl("layer_norm", TORCH_FN(fp8::autocast::layer_norm));
}

TORCH_LIBRARY_IMPL(fp8, AutocastCPU, m) {
  fp8::autocast::register_kernels<at::kCPU, c10::DispatchKey::AutocastCPU>(m);
}
