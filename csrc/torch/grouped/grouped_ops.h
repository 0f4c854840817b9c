// Kernels of grouped_linear and moe_experts, and of the private ops that they are differentiated
// through. kernel: CPU and CUDA. meta: shapes, dtypes and strides only. composite: made of those,
// on any device. autograd: what records a graph. T tokens or rows, E experts, k of them to a token.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fp8 {

using OptionalTensor = std::optional<at::Tensor>;

namespace kernel {

// y [T, N] and, with save_x, what wgrad needs of x: x_t [pad16(K), L] e4m3, quantized within each
// group, its scale [E, pad16(K)], and padded_offsets [E] int32, where the groups lie in it (L =
// max_padded_rows). Recipes without FP8 wgrad save x itself and get empty tensors. With save_amax,
// what dgrad needs to quantize the weight in one pass: the maxima of its columns [E, pad16(K)]
// fp32, empty where there are none (operand::keeps_amax).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _grouped_forward(
    const at::Tensor& x,         // [T, K]
    const at::Tensor& weight,    // [E, N, K], stored that way or transposed
    const at::Tensor& offsets,   // [E] int32, the row that ends each group
    const OptionalTensor& bias,  // [E, N]
    int64_t recipe, bool save_x, bool save_amax);

// dx [T, K], dweight [E, N, K], dbias [E, N]; an empty tensor where one is not asked for. dweight
// is stored as the weight is (`transposed`: [E, K, N] in memory). With main_grad it is added to
// that, or written there (overwrite), and its place is empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> _grouped_backward(
    const at::Tensor& dy,                  // [T, N]
    const OptionalTensor& x,               // x_t, or x [T, K] without FP8 wgrad
    const OptionalTensor& x_t_scale,       // [E, pad16(K)] fp32
    const OptionalTensor& padded_offsets,  // [E] int32
    const OptionalTensor& weight,          // [E, N, K]
    const at::Tensor& offsets,             // [E] int32
    c10::SymInt in_features, bool transposed, int64_t recipe, bool needs_dx, bool needs_dweight,
    bool needs_dbias, const OptionalTensor& weight_amax,  // [E, pad16(K)]
    const OptionalTensor& main_grad,  // [E, N, K] of any strides, high precision
    bool overwrite);

// y [T, H]; gate_up_out [T * k, 2 I], the first product without its bias; offsets [E], place [T *
// k] and source [T * k], see core_grouped.h; with save_amax, what _grouped_forward says of both
// weights, [E, H] and [E, I].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_moe_forward(const at::Tensor& x,                 // [T, H]
             const at::Tensor& top_k_index,       // [T, k] int64
             const at::Tensor& top_k_weights,     // [T, k]
             const at::Tensor& gate_up,           // [E, 2 I, H], stored that way or transposed
             const at::Tensor& down,              // [E, H, I], the same
             const OptionalTensor& gate_up_bias,  // [E, 2 I]
             const OptionalTensor& down_bias,     // [E, H]
             int64_t activation, bool interleaved, double alpha, double limit, int64_t recipe,
             bool save_amax);

// The gradients of x, top_k_weights, gate_up, down, gate_up_bias, down_bias, in their shapes, as
// far as the bits of `needs` ask for them. Main_grads as of _grouped_backward.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _moe_backward(
    const at::Tensor& dy,                // [T, H]
    const at::Tensor& x,                 // to down_bias: as _moe_forward's
    const at::Tensor& top_k_index,       //
    const at::Tensor& top_k_weights,     //
    const at::Tensor& gate_up,           //
    const at::Tensor& down,              //
    const OptionalTensor& gate_up_bias,  //
    const OptionalTensor& down_bias,     //
    const at::Tensor& gate_up_out,       // [T * k, 2 I]
    const at::Tensor& offsets,           // [E] int32
    const at::Tensor& place,             // [T * k] int32
    const at::Tensor& source,            // [T * k] int32
    int64_t activation, bool interleaved, double alpha, double limit, int64_t recipe, int64_t needs,
    const OptionalTensor& gate_up_amax, const OptionalTensor& down_amax,
    const OptionalTensor& gate_up_main_grad,  // [E, 2 I, H]
    const OptionalTensor& down_main_grad);    // [E, H, I]

}  // namespace kernel

namespace meta {
decltype(kernel::_grouped_forward) _grouped_forward;
decltype(kernel::_grouped_backward) _grouped_backward;
decltype(kernel::_moe_forward) _moe_forward;
decltype(kernel::_moe_backward) _moe_backward;
}  // namespace meta

namespace in_place {  // count the writes of main_grads
decltype(kernel::_grouped_backward) _grouped_backward;
decltype(kernel::_moe_backward) _moe_backward;
}  // namespace in_place

namespace composite {

// y [T, N]
at::Tensor grouped_linear(const at::Tensor& x,         // [T, K]
                          const at::Tensor& weight,    // [E, N, K]
                          const at::Tensor& offsets,   // [E] int32
                          const OptionalTensor& bias,  // [E, N]
                          std::string_view recipe);

// y [T, H]
at::Tensor moe_experts(const at::Tensor& x,                 // [T, H]
                       const at::Tensor& top_k_index,       // [T, k] int64
                       const at::Tensor& top_k_weights,     // [T, k]
                       const at::Tensor& gate_up,           // [E, 2 I, H]
                       const at::Tensor& down,              // [E, H, I]
                       const OptionalTensor& gate_up_bias,  // [E, 2 I]
                       const OptionalTensor& down_bias,     // [E, H]
                       std::string_view activation, bool interleaved, double alpha, double limit,
                       std::string_view recipe);

// The same with main_grads that the backward writes, of which the forward knows nothing. Stand-ins,
// of the weights' shapes, are what autograd gets as gradients.
at::Tensor _grouped_linear_into(const at::Tensor& x,         // to bias: as grouped_linear's
                                const at::Tensor& weight,    //
                                const at::Tensor& offsets,   //
                                const OptionalTensor& bias,  //
                                std::string_view recipe,
                                const at::Tensor& main_grad,  // [E, N, K]
                                bool overwrite, const OptionalTensor& stand_in);
at::Tensor _moe_experts_into(const at::Tensor& x,  // to down_bias: as moe_experts'
                             const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
                             const at::Tensor& gate_up, const at::Tensor& down,
                             const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
                             std::string_view activation, bool interleaved, double alpha,
                             double limit, std::string_view recipe,
                             const OptionalTensor& gate_up_main_grad,  // [E, 2 I, H]
                             const OptionalTensor& down_main_grad,     // [E, H, I]
                             bool overwrite_gate_up, bool overwrite_down,
                             const OptionalTensor& gate_up_stand_in,
                             const OptionalTensor& down_stand_in);

}  // namespace composite

namespace autograd {
decltype(composite::grouped_linear) grouped_linear;
decltype(composite::moe_experts) moe_experts;
decltype(composite::_grouped_linear_into) _grouped_linear_into;
decltype(composite::_moe_experts_into) _moe_experts_into;
}  // namespace autograd

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
// The main_grad's content does not matter.
inline constexpr int64_t kOverwriteGateUp = 128;
inline constexpr int64_t kOverwriteDown = 256;
}  // namespace needs

// What the two ops accept, in the shapes above; shared by CPU, CUDA and Meta.
void check_grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets,
                          const OptionalTensor& bias);
void check_moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                       const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                       const at::Tensor& down, const OptionalTensor& gate_up_bias,
                       const OptionalTensor& down_bias);

// What experts in high precision and frozen ones have in common, in the name of fp8::`op`: all but
// the dtype of the weights.
void check_mixture(const char* op, const at::Tensor& x, const at::Tensor& top_k_index,
                   const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                   const at::Tensor& down, const OptionalTensor& gate_up_bias,
                   const OptionalTensor& down_bias);

// The main_grads that are given.
void check_moe_main_grads(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
                          const OptionalTensor& gate_up_main_grad,
                          const OptionalTensor& down_main_grad);

// 'silu', 'gelu', 'gelu_tanh', 'clamped_silu' -> core::Activation's number.
int64_t activation_index(std::string_view name, const char* op = "moe_experts");

}  // namespace fp8
