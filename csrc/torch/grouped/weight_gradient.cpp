#include "torch/grouped/weight_gradient.h"

#include <ATen/ATen.h>

#include "torch/grouped/grouped_mm.h"
#include "torch/matmul/matmul.h"

namespace fp8::grouped {

// A product [groups, rows, cols] of padded extents, in memory as the weight is.
at::Tensor WeightGradient::stored(const at::Tensor& product) const {
  const int64_t rows = transposed ? in_features : features;
  const int64_t cols = transposed ? features : in_features;
  const bool whole = product.size(1) == rows && product.size(2) == cols;
  const at::Tensor part = whole ? product : product.narrow(1, 0, rows).narrow(2, 0, cols);
  if (main_grad.defined()) {
    store_product(main_grad, transposed ? part.transpose(1, 2) : part, overwrite);
    return {};
  }
  const at::Tensor dense = whole ? part : part.contiguous();
  return transposed ? dense.transpose(1, 2) : dense;
}

at::Tensor WeightGradient::fp8(const Side& grad, const Side& input,
                               const at::Tensor& padded_offsets) const {
  if (main_grad.defined()) {
    const bool whole = grad.codes.size(0) == features && input.codes.size(0) == in_features;
    const bool other_way = is_stored_transposed(main_grad);
    const at::Tensor out = other_way ? main_grad.transpose(1, 2) : main_grad;
    if (whole && out.is_contiguous() && out.scalar_type() == at::kFloat &&
        add_columns(other_way ? input : grad, other_way ? grad : input, padded_offsets, out,
                    fast_accum, overwrite)) {
      return {};
    }
  }
  return stored(multiply_columns(transposed ? input : grad, transposed ? grad : input,
                                 padded_offsets, main_grad.defined() ? at::kFloat : dtype,
                                 fast_accum));
}

at::Tensor WeightGradient::high_precision(const at::Tensor& grad, const at::Tensor& input,
                                          const at::Tensor& offsets) const {
  at::ScalarType product = dtype;
  if (main_grad.defined()) product = grad.is_cpu() ? at::kFloat : at::kBFloat16;
  return stored(multiply_high_precision(transposed ? input : grad, transposed ? grad : input,
                                        offsets, product));
}

at::Tensor WeightGradient::zeros(const at::Tensor& like, int64_t groups) const {
  if (main_grad.defined()) {
    if (overwrite) main_grad.zero_();
    return {};
  }
  const auto options = like.options().dtype(dtype);
  return transposed ? at::zeros({groups, in_features, features}, options).transpose(1, 2)
                    : at::zeros({groups, features, in_features}, options);
}

}  // namespace fp8::grouped
