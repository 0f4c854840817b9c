// The steps of a linear layer, forward and backward, for operators that are made of several layers
// and quantize what lies between them themselves.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "torch/common/recipe.h"
#include "torch/quantize/operand.h"

namespace fp8::linear {

using OptionalTensor = std::optional<at::Tensor>;

// The rows of a history.
enum class Role : uint8_t { kInput, kWeight, kGradOutput };

// What makes a scale. Dynamic without a history, which a recipe that is not delayed has not.
Scaling scaling_of(const OptionalTensor& history,  // [3, kAmaxHistorySize] int32
                   Role role);

// The weight as fprop reads it.
Operand quantize_weight(const at::Tensor& weight,  // [N, K]
                        const Recipe& recipe, const OptionalTensor& history, bool keep_amax,
                        bool pdl);

// y = x W^T + b, [M, N] in `dtype`. Extents must be positive. invariant: see
// torch/matmul/batch_invariant.h.
at::Tensor forward_product(const Side& x, const Side& weight, const OptionalTensor& bias,
                           at::ScalarType dtype, const Recipe& recipe, bool invariant);

struct BackwardArgs {
  const at::Tensor& dy;     // [M, N]; where it comes quantized, any tensor of its shape and dtype
  const OptionalTensor& x;  // x^T in FP8, or x
  const OptionalTensor& x_t_scale;    // fp32: [], or scale_sizes(x_t's sizes)
  const OptionalTensor& weight;       // [N, K]
  const OptionalTensor& weight_amax;  // [] fp32
  int64_t k;
  Recipe recipe;
  bool needs_dx;
  bool needs_dweight;
  bool needs_dbias;
  at::Tensor main_grad = {};              // [N, K], optional: takes dweight
  bool overwrite = false;                 // else main_grad is added to
  const OptionalTensor& history;          // [3, kAmaxHistorySize] int32
  const Operand* quantized_dy = nullptr;  // optional: what a producer wrote
  at::Tensor dx_into = {};                // [M, K], optional: dx is added to it
};

struct Gradients {  // undefined where not asked for; dweight where main_grad took it
  at::Tensor dx;    // [M, K]
  at::Tensor dweight;
  at::Tensor dbias;
};

Gradients backward(const BackwardArgs& args);

// dy as the products of `args` read it, with its bias gradient where that is asked for.
QuantizeRequest request_of_dy(const BackwardArgs& args);

}  // namespace fp8::linear
