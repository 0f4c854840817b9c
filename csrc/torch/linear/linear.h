// Kernels of fused_linear and of the private ops that it is differentiated through. kernel: CPU and
// CUDA. meta: shapes, dtypes and strides only. composite: made of those, on any device. autograd:
// what records a graph. A signature is spelled once; `decltype` declares the others.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fp8 {

struct Recipe;

namespace kernel {

// y [..., N], and what a backward needs of it. Where `save_x_t` or `save_weight_amax` is false, or
// the recipe has no use for it, the place is taken by an empty tensor.
//   x_t          [pad16(K), pad16(M)] FP8, the transposed quantized x (recipes with FP8 wgrad)
//   x_t_scale    fp32, its scale: [], [pad16(K)], or [ceil(M / 128), pad16(K)] in 1x128 blocks
//   weight_amax  [] fp32, tensorwise: the backward remakes the transposed weight in one pass
// With input_scale x is quantized in one pass; the backward knows nothing of it but x_t_scale, a
// copy. Of a history the rows of x and weight move on.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _linear_forward(
    const at::Tensor& x,                    // [..., K]
    const at::Tensor& weight,               // [N, K]
    const std::optional<at::Tensor>& bias,  // [N]
    int64_t recipe,                         // recipe_id
    bool save_x_t, bool save_weight_amax,
    const std::optional<at::Tensor>& input_scale,  // [] fp32, tensorwise: a static scale of x
    const std::optional<at::Tensor>& history);     // [3, kAmaxHistorySize] int32, `delayed`

// dx [..., K], dweight [N, K], dbias [N]; an empty tensor where one is not asked for. What an
// output needs must be given: x for dweight, weight for dx. With main_grad dweight is added to
// that, or written there (overwrite), and its place is empty: the sum is rounded once, to
// main_grad's dtype. Of a history the row of dy moves on.
std::tuple<at::Tensor, at::Tensor, at::Tensor> _linear_backward(
    const at::Tensor& dy,                          // [..., N]
    const std::optional<at::Tensor>& x,            // x_t, or x without FP8 wgrad
    const std::optional<at::Tensor>& x_t_scale,    // see _linear_forward
    const std::optional<at::Tensor>& weight,       // [N, K]
    const std::optional<at::Tensor>& weight_amax,  // [] fp32, tensorwise
    c10::SymInt in_features, int64_t recipe, bool needs_dx, bool needs_dweight, bool needs_dbias,
    const std::optional<at::Tensor>& main_grad,  // [N, K] of any strides, high precision
    bool overwrite,
    const std::optional<at::Tensor>& history);  // [3, kAmaxHistorySize] int32, `delayed`

}  // namespace kernel

namespace meta {
decltype(kernel::_linear_forward) _linear_forward;
decltype(kernel::_linear_backward) _linear_backward;
}  // namespace meta

namespace in_place {  // counts the write of history
decltype(kernel::_linear_forward) _linear_forward;
}  // namespace in_place

namespace composite {

// y [..., N], without a graph.
at::Tensor fused_linear(
    const at::Tensor& x,                    // [..., K]
    const at::Tensor& weight,               // [N, K]
    const std::optional<at::Tensor>& bias,  // [N]
    std::string_view recipe,
    const std::optional<at::Tensor>& input_scale,  // [] fp32, tensorwise: a static scale of x
    const std::optional<at::Tensor>& history);     // [3, kAmaxHistorySize] int32, `delayed`

// The same out of place, with the history that comes next ([0] without one): what functionalization
// makes of fused_linear, whose schema may write.
std::tuple<at::Tensor, at::Tensor> _fused_linear_functional(
    const at::Tensor& x,                    // [..., K]
    const at::Tensor& weight,               // [N, K]
    const std::optional<at::Tensor>& bias,  // [N]
    std::string_view recipe,
    const std::optional<at::Tensor>& input_scale,  // [] fp32
    const std::optional<at::Tensor>& history);     // [3, kAmaxHistorySize] int32

// The same with a main_grad that the backward writes (_linear_backward), of which the forward knows
// nothing; without a gradient of the weight, nothing does. fused_linear's schema has no place for
// it.
at::Tensor _fused_linear_into(
    const at::Tensor& x,                    // [..., K]
    const at::Tensor& weight,               // [N, K]
    const std::optional<at::Tensor>& bias,  // [N]
    std::string_view recipe,
    const at::Tensor& main_grad,  // [N, K]
    bool overwrite,
    const std::optional<at::Tensor>& stand_in,     // [N, K], what autograd gets as the gradient
    const std::optional<at::Tensor>& input_scale,  // [] fp32
    const std::optional<at::Tensor>& history);     // [3, kAmaxHistorySize] int32

}  // namespace composite

namespace autograd {
decltype(composite::fused_linear) fused_linear;
decltype(composite::_fused_linear_into) _fused_linear_into;
decltype(kernel::_linear_backward) _linear_backward;
}  // namespace autograd

// What fused_linear accepts, of one dtype on one device.
void check_linear(const at::Tensor& x,                     // [..., K]
                  const at::Tensor& weight,                // [N, K]
                  const std::optional<at::Tensor>& bias);  // [N]

// A static scale of x, on its device, and a recipe that has one scale per tensor.
void check_input_scale(const at::Tensor& scale,  // [] fp32
                       const Recipe& recipe, const at::Tensor& x);

// Histories of x, weight and dy, on x's device, and a recipe that has them.
void check_history(const at::Tensor& history,  // [3, kAmaxHistorySize] int32
                   const Recipe& recipe, const at::Tensor& x);

}  // namespace fp8
