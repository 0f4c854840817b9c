// Kernels of experts_frozen, the experts of a mixture whose weights are FP8 and stay as they are,
// and of the private ops that it is differentiated through. kernel: CPU and CUDA. meta: shapes and
// dtypes only. composite: made of those. The contract is in fp8/ops.h. T tokens, k experts to each,
// E experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "torch/common/recipe.h"
#include "torch/grouped/moe_passes.h"
#include "torch/quantize/operand.h"

namespace fp8 {

using OptionalTensor = std::optional<at::Tensor>;

namespace kernel {

// y [T, H]; gate_up_out [T * k, 2 I], the first product without its bias; offsets [E], place [T *
// k] and source [T * k], see core_grouped.h.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _experts_frozen_forward(
    const at::Tensor& x,                 // [T, H] high precision
    const at::Tensor& top_k_index,       // [T, k] int64
    const at::Tensor& top_k_weights,     // [T, k]
    const at::Tensor& gate_up,           // [E, 2 I, H] e4m3
    const at::Tensor& gate_up_scale,     // fp32 [E], [E, 2 I] or a grid of blocks, see ops.h
    const at::Tensor& down,              // [E, H, I] e4m3
    const at::Tensor& down_scale,        // the same of down
    const OptionalTensor& gate_up_bias,  // [E, 2 I]
    const OptionalTensor& down_bias,     // [E, H]
    int64_t activation, bool interleaved, double alpha, double limit, bool blocks,
    bool power_of_two);

// The gradients of x, top_k_weights, gate_up_bias and down_bias, in their shapes, as far as the
// bits of `needs` (grouped_ops.h) ask for them; empty tensors in place of others.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _experts_frozen_backward(
    const at::Tensor& dy,             // [T, H]
    const at::Tensor& top_k_index,    // to down_bias: as _experts_frozen_forward's
    const at::Tensor& top_k_weights,  //
    const at::Tensor& gate_up, const at::Tensor& gate_up_scale, const at::Tensor& down,
    const at::Tensor& down_scale, const OptionalTensor& gate_up_bias,
    const OptionalTensor& down_bias,
    const at::Tensor& gate_up_out,  // [T * k, 2 I]
    const at::Tensor& offsets,      // [E] int32
    const at::Tensor& place,        // [T * k] int32
    const at::Tensor& source,       // [T * k] int32
    int64_t activation, bool interleaved, double alpha, double limit, bool blocks,
    bool power_of_two, int64_t needs);

}  // namespace kernel

namespace meta {
decltype(kernel::_experts_frozen_forward) _experts_frozen_forward;
decltype(kernel::_experts_frozen_backward) _experts_frozen_backward;
}  // namespace meta

namespace composite {

// y [T, H]
at::Tensor experts_frozen(const at::Tensor& x,              // to down_bias: as above
                          const at::Tensor& top_k_index,    //
                          const at::Tensor& top_k_weights,  //
                          const at::Tensor& gate_up, const at::Tensor& gate_up_scale,
                          const at::Tensor& down, const at::Tensor& down_scale,
                          const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
                          std::string_view activation, bool interleaved, double alpha, double limit,
                          std::optional<std::string_view> input_granularity, bool power_of_two);

}  // namespace composite

namespace autograd {
decltype(composite::experts_frozen) experts_frozen;
}  // namespace autograd

namespace experts {

// Whether the scales are of 128x128 blocks, and x is quantized in blocks; errors in the name of
// experts_frozen where a call is refused, on every device and for fake tensors alike.
bool checked_blocks(const at::Tensor& x, const at::Tensor& top_k_index,
                    const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                    const at::Tensor& gate_up_scale, const at::Tensor& down,
                    const at::Tensor& down_scale, const OptionalTensor& gate_up_bias,
                    const OptionalTensor& down_bias,
                    std::optional<std::string_view> input_granularity);

// Without a call where nothing is to be done: schema checks take an operator that returns its input
// for a mistake.
inline at::Tensor in_float(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat ? t : t.to(at::kFloat);
}

// How x and dy are quantized beside such weights, and how products accumulate.
Recipe recipe_of(bool blocks, bool power_of_two);

// Codes and scales as a product over in-features reads them, [E, N, K]: where they lie, if they are
// contiguous.
Side given_side(const at::Tensor& codes, const at::Tensor& scale, bool blocks);

// The same transposed, [E, K, N], for a product over out-features: a copy of the codes. Scales of
// blocks and of experts go with it; of those of rows its left operand has taken care
// (times_scales), and here they are ones.
Side transposed_side(const at::Tensor& codes, const at::Tensor& scale, bool blocks);

// Rows times the scales of the out-features of their experts: [T * k, N]. Gradients in fp16 may be
// as small as that format goes: in fp32 then.
at::Tensor times_scales(const at::Tensor& rows,   // [T * k, N]
                        const at::Tensor& scale,  // [E, N], or with a third dimension of 1
                        const grouped::Routing& routing,
                        const at::Tensor& experts);  // [T, k] int64

}  // namespace experts

}  // namespace fp8
