// weight.main_grad, of layers dense and grouped: a buffer that a backward adds a weight's gradient
// to, and autograd does not get.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "torch/common/tensors.h"

namespace fp8 {

struct GradientBuffer {
  const at::Tensor& main_grad;                // of the weight's shape, any strides
  bool overwrite;                             // else dW is added
  const std::optional<at::Tensor>& stand_in;  // what autograd gets as the weight's gradient instead
};

// What a gradient of these sizes is added to, on the device of `like`; `op` calls it `name`.
inline void check_main_grad(const char* op, const char* name, const at::Tensor& main_grad,
                            c10::SymIntArrayRef weight_sizes, const at::Tensor& like) {
  FP8_CHECK_HIGH_PRECISION(op, name, main_grad);
  FP8_CHECK_VALUE(main_grad.sym_sizes() == weight_sizes, "fp8::", op, ": expected ", name,
                  " of weight's shape ", weight_sizes, ", got ", main_grad.sym_sizes());
  FP8_CHECK_SAME_DEVICE(op, name, main_grad, "x", like);
  FP8_CHECK_VALUE(!main_grad.requires_grad(), "fp8::", op, ": expected ", name,
                  " without requires_grad, a plain buffer, got one that requires a gradient");
}

}  // namespace fp8
