// Kernels of linear_frozen, a linear layer whose weight is FP8 and stays as it is: of a checkpoint,
// or of fp8.freeze. kernel: CPU and CUDA. meta: shapes and dtypes only. Contracts are in fp8/ops.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "fp8/core.h"

namespace fp8 {

namespace frozen {

using OptionalTensor = std::optional<at::Tensor>;

// How the two operands of a call are scaled.
struct Form {
  core::Granularity weight;  // kTensorwise, kRowwise or kBlock128x128: what weight_scale has
  core::Granularity input;   // kTensorwise, kRowwise or kBlock1x128
};

// What a call computes; errors in the name of linear_frozen where it is refused, on every device
// and for fake tensors alike.
Form checked_form(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                  const OptionalTensor& bias, const OptionalTensor& input_scale,
                  std::optional<std::string_view> input_granularity);

// What weight_scale has one element for, in the name of fp8::`op`. Some shapes could be two things
// (those of one block, and [1, N]): blocks says which, and without it one element is the weight's
// and the grid of blocks goes before [1, N].
core::Granularity weight_granularity(const char* op, const at::Tensor& weight,
                                     const at::Tensor& weight_scale, std::optional<bool> blocks);

// codes [N, K] as a product reads them, [rows, pad16(K)] with zeros beyond: in place where they lie
// so, else copied.
at::Tensor ready_codes(const at::Tensor& codes, int64_t rows);

// y of few rows [m, N], or nothing where matmul takes the product (fp8/core_decode.h). x is not
// empty.
std::optional<at::Tensor> decode(const at::Tensor& x, const at::Tensor& weight,
                                 const at::Tensor& weight_scale, const Form& form,
                                 const OptionalTensor& bias, const OptionalTensor& input_scale,
                                 bool power_of_two);

}  // namespace frozen

namespace kernel {

at::Tensor linear_frozen(const at::Tensor& x,             // [..., K] high precision
                         const at::Tensor& weight,        // [N, K] e4m3
                         const at::Tensor& weight_scale,  // fp32 of 1 element; [N], [N, 1] or
                                                          // [1, N]; or a grid of 128x128 blocks
                         const std::optional<at::Tensor>& bias,         // [N] in x's dtype
                         const std::optional<at::Tensor>& input_scale,  // fp32 of 1 element
                         std::optional<std::string_view> input_granularity, bool power_of_two,
                         bool decode);

// dx [..., K] = dy * weight_scale * weight, on the forward's own codes. blocks: weight_scale is of
// 128x128 blocks.
at::Tensor _linear_frozen_backward(const at::Tensor& dy,            // [..., N]
                                   const at::Tensor& weight,        // [N, K] e4m3
                                   const at::Tensor& weight_scale,  // as above
                                   bool blocks, bool power_of_two);

}  // namespace kernel

namespace meta {
decltype(kernel::linear_frozen) linear_frozen;
decltype(kernel::_linear_frozen_backward) _linear_frozen_backward;
}  // namespace meta

namespace autograd {
decltype(kernel::linear_frozen) linear_frozen;
}  // namespace autograd

}  // namespace fp8
