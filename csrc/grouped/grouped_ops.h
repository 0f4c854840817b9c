// Kernels of grouped_linear and moe_experts, and of the private ops that they are differentiated
// through.
//
//   _grouped_forward: y and, with save_x, what wgrad needs of x: x_t [pad16(K), L] e4m3, quantized
//     within each group, its scale [E, pad16(K)], and padded_offsets [E] int32, where the groups
//     lie in it (L = max_padded_rows). Recipes without FP8 wgrad save x itself and get empty
//     tensors.
//   _grouped_backward: dx, dweight, dbias; an empty tensor where one is not asked for. dweight is
//     stored as the weight is (`transposed`: [E, K, N] in memory).
//   _moe_forward: y; gate_up_out [T * k, 2 I], the first product without its bias; offsets [E],
//     place [T * k] and source [T * k], see core_grouped.h.
//   _moe_backward: the gradients of x, top_k_weights, gate_up, down, gate_up_bias, down_bias, as
//     far as the bits of `needs` ask for them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fp8 {

using OptionalTensor = std::optional<at::Tensor>;

#define FP8_DECLARE_GROUPED_OPS                                                                   \
  at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight,                        \
                            const at::Tensor& offsets, const std::optional<at::Tensor>& bias,     \
                            std::string_view recipe);                                             \
  at::Tensor moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,                      \
                         const at::Tensor& top_k_weights, const at::Tensor& gate_up,              \
                         const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,   \
                         const std::optional<at::Tensor>& down_bias, std::string_view activation, \
                         bool interleaved, double alpha, double limit, std::string_view recipe);

#define FP8_DECLARE_GROUPED_PRIVATE_OPS                                                            \
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _grouped_forward(                     \
      const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets,                    \
      const std::optional<at::Tensor>& bias, int64_t recipe, bool save_x);                         \
  std::tuple<at::Tensor, at::Tensor, at::Tensor> _grouped_backward(                                \
      const at::Tensor& dy, const std::optional<at::Tensor>& x,                                    \
      const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& padded_offsets, \
      const std::optional<at::Tensor>& weight, const at::Tensor& offsets, c10::SymInt in_features, \
      bool transposed, int64_t recipe, bool needs_dx, bool needs_dweight, bool needs_dbias);       \
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _moe_forward(             \
      const at::Tensor& x, const at::Tensor& top_k_index, const at::Tensor& top_k_weights,         \
      const at::Tensor& gate_up, const at::Tensor& down,                                           \
      const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,   \
      int64_t activation, bool interleaved, double alpha, double limit, int64_t recipe);           \
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>               \
  _moe_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& top_k_index,          \
                const at::Tensor& top_k_weights, const at::Tensor& gate_up,                        \
                const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,             \
                const std::optional<at::Tensor>& down_bias, const at::Tensor& gate_up_out,         \
                const at::Tensor& offsets, const at::Tensor& place, const at::Tensor& source,      \
                int64_t activation, bool interleaved, double alpha, double limit, int64_t recipe,  \
                int64_t needs);

namespace kernel {
FP8_DECLARE_GROUPED_OPS
FP8_DECLARE_GROUPED_PRIVATE_OPS
}  // namespace kernel
namespace meta {
FP8_DECLARE_GROUPED_OPS
FP8_DECLARE_GROUPED_PRIVATE_OPS
}  // namespace meta
namespace autograd {
FP8_DECLARE_GROUPED_OPS
}
#undef FP8_DECLARE_GROUPED_OPS
#undef FP8_DECLARE_GROUPED_PRIVATE_OPS

// The bits of _moe_backward's `needs`.
namespace needs {
inline constexpr int64_t kX = 1;
inline constexpr int64_t kWeights = 2;
inline constexpr int64_t kGateUp = 4;
inline constexpr int64_t kDown = 8;
inline constexpr int64_t kGateUpBias = 16;
inline constexpr int64_t kDownBias = 32;
// gate_up_out is nobody else's and is not read again: its memory is used for its gradient, and
// given back before the weight gradients are made.
inline constexpr int64_t kMayConsume = 64;
}  // namespace needs

// What the two ops accept; shared by CPU, CUDA and Meta.
void check_grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets,
                          const std::optional<at::Tensor>& bias);
void check_moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                       const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                       const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,
                       const std::optional<at::Tensor>& down_bias);

// 'silu', 'gelu', 'gelu_tanh', 'clamped_silu' -> core::Activation's number.
int64_t activation_index(std::string_view name);

}  // namespace fp8
