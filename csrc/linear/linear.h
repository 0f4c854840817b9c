// Kernels of fused_linear and of the two private ops that it is differentiated through.
//
//   _linear_forward: y, and what a backward needs of it. Where `save_x_t` or `save_weight_amax` is
//   false, or the
//     recipe has no use for it, the place is taken by an empty tensor.
//       x_t          [pad16(K), pad16(M)] FP8, the transposed quantized x (recipes with FP8 wgrad)
//       x_t_scale    fp32, its scale: [], [pad16(K)], or [ceil(M / 128), pad16(K)] in 1x128 blocks
//       weight_amax  [] fp32 (tensorwise): lets the backward remake the transposed weight in one
//       pass
//     input_scale, [] fp32, tensorwise: x is quantized with this scale, in one pass over it. The
//     backward knows nothing of it but x_t_scale, a copy.
//     history, [3, kAmaxHistorySize] int32, recipe `delayed`: what it is for the public op. This
//     one moves the rows of x and weight on, a backward that of dy; nothing else is written.
//   _linear_backward: dx, dweight, dbias; an empty tensor where one is not asked for. `x` is x_t,
//   or x itself for
//     recipes without FP8 wgrad. What an output needs must be given: x for dweight, weight for dx.
//   _linear_backward_into: the same with dweight added to main_grad [N, K], or written there
//     (overwrite); x must be given. main_grad may have any strides and any high-precision dtype;
//     the sum is rounded once, to that dtype.
//   _fused_linear_into: fused_linear, whose backward is that. Its forward does not look at
//     main_grad; without a gradient of the weight, nothing does.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fp8 {

struct Recipe;

#define FP8_DECLARE_LINEAR_OPS                                                                 \
  at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,                       \
                          const std::optional<at::Tensor>& bias, std::string_view recipe,      \
                          const std::optional<at::Tensor>& input_scale,                        \
                          const std::optional<at::Tensor>& history);                           \
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _linear_forward(                  \
      const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,    \
      int64_t recipe, bool save_x_t, bool save_weight_amax,                                    \
      const std::optional<at::Tensor>& input_scale, const std::optional<at::Tensor>& history); \
  std::tuple<at::Tensor, at::Tensor, at::Tensor> _linear_backward(                             \
      const at::Tensor& dy, const std::optional<at::Tensor>& x,                                \
      const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& weight,     \
      const std::optional<at::Tensor>& weight_amax, c10::SymInt in_features, int64_t recipe,   \
      bool needs_dx, bool needs_dweight, bool needs_dbias,                                     \
      const std::optional<at::Tensor>& history);                                               \
  at::Tensor _fused_linear_into(                                                               \
      const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,    \
      std::string_view recipe, const at::Tensor& main_grad, bool overwrite,                    \
      const std::optional<at::Tensor>& stand_in, const std::optional<at::Tensor>& input_scale, \
      const std::optional<at::Tensor>& history);                                               \
  std::tuple<at::Tensor, at::Tensor> _linear_backward_into(                                    \
      at::Tensor& main_grad, const at::Tensor& dy, const std::optional<at::Tensor>& x,         \
      const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& weight,     \
      const std::optional<at::Tensor>& weight_amax, c10::SymInt in_features, int64_t recipe,   \
      bool needs_dx, bool needs_dbias, bool overwrite, const std::optional<at::Tensor>& history);

namespace kernel {
FP8_DECLARE_LINEAR_OPS
}
namespace meta {
FP8_DECLARE_LINEAR_OPS
}
namespace autograd {  // all but _linear_forward
FP8_DECLARE_LINEAR_OPS
}
#undef FP8_DECLARE_LINEAR_OPS

namespace in_place {  // counts the write of history
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    int64_t recipe, bool save_x_t, bool save_weight_amax,
    const std::optional<at::Tensor>& input_scale, const std::optional<at::Tensor>& history);
}  // namespace in_place

// What fused_linear accepts: x [..., K], weight [N, K], bias [N] of one dtype on one device.
void check_linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias);

// A given scale of x, [] fp32 on its device, and a recipe that has one scale per tensor.
void check_input_scale(const at::Tensor& scale, const Recipe& recipe, const at::Tensor& x);

// Histories of x, weight and dy, [3, kAmaxHistorySize] int32 on x's device, and a recipe that has
// them.
void check_history(const at::Tensor& history, const Recipe& recipe, const at::Tensor& x);

// What a gradient of shape [features, in_features] is added to, on the device of `like`.
void check_main_grad(const at::Tensor& main_grad, const c10::SymInt& features,
                     const c10::SymInt& in_features, const at::Tensor& like);

}  // namespace fp8
