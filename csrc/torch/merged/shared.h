// What merged_linear's kernels and their fake ones share.
#pragma once

#include "torch/common/recipe.h"
#include "torch/merged/merged.h"

namespace fp8::merged {

template <typename Sizes>
auto with_last(const Sizes& sizes, const typename Sizes::value_type& last) {
  std::vector<typename Sizes::value_type> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

inline c10::SymInt sum_of(at::TensorList tensors, int64_t dim) {
  c10::SymInt sum = 0;
  for (const at::Tensor& t : tensors) sum = sum + t.sym_size(dim);
  return sum;
}

// Of _merged_backward's needs_dweight.
inline bool wants(int64_t needs_dweight, size_t part) { return ((needs_dweight >> part) & 1) != 0; }

inline bool is_tensorwise(const Recipe& recipe) {
  return recipe.granularity == core::Granularity::kTensorwise;
}

// What the private ops accept.
void check_forward(const at::Tensor& x, at::TensorList weights,
                   const std::optional<at::Tensor>& bias, int64_t recipe,
                   const std::optional<at::Tensor>& history);
void check_backward(at::TensorList dys, at::TensorList weights, const c10::SymInt& in_features,
                    bool needs_dx, int64_t recipe, const std::optional<at::Tensor>& history);

}  // namespace fp8::merged
