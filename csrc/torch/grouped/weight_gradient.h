// The weight gradients of grouped products, dW[g] = grad^T input over the rows of each group g, in
// the recipe's way, and where they go: a tensor stored as the weight is, or weight.main_grad.
#pragma once

#include "torch/grouped/operands.h"

namespace fp8::grouped {

struct WeightGradient {
  int64_t features;  // N and K: operands may be padded to sixteens
  int64_t in_features;
  bool transposed;  // the weight is stored as [groups, K, N]
  at::ScalarType dtype;
  bool fast_accum;
  at::Tensor main_grad = {};  // [groups, N, K] of any strides, optional
  bool overwrite = false;     // else main_grad is added to

  // [groups, N, K], or undefined where main_grad took it. Sums are made in fp32, and added to
  // main_grad before they are rounded to its dtype.
  at::Tensor fp8(const Side& grad,   // [pad16(N), L]
                 const Side& input,  // [pad16(K), L]
                 const at::Tensor& padded_offsets) const;

  // The same from rows as they are. On a GPU they are multiplied in bf16, and so rounded.
  at::Tensor high_precision(const at::Tensor& grad,   // [rows, pad16(N)]
                            const at::Tensor& input,  // [rows, pad16(K)]
                            const at::Tensor& offsets) const;

  // Of no rows.
  at::Tensor zeros(const at::Tensor& like, int64_t groups) const;

 private:
  at::Tensor stored(const at::Tensor& product) const;
};

}  // namespace fp8::grouped
