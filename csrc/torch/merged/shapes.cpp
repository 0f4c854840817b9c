// The shapes of merged_linear's private ops, for fake tensors.
#include <ATen/ATen.h>

#include "torch/common/tensors.h"
#include "torch/merged/shared.h"
#include "torch/quantize/operand.h"

namespace fp8 {

using merged::is_tensorwise;
using merged::sum_of;
using merged::wants;
using merged::with_last;
using OptionalTensor = std::optional<at::Tensor>;

namespace meta {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _merged_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensor& bias, int64_t recipe_id,
    bool save_x_t, bool save_weight_amax, const OptionalTensor& history) {
  merged::check_forward(x, weights, bias, recipe_id, history);
  const Recipe recipe = recipe_at(recipe_id);
  const auto fp32 = x.options().dtype(at::kFloat);
  const bool x_t = save_x_t && recipe.fp8_wgrad;
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  const c10::SymInt k = pad16(x.sym_size(-1));
  const c10::SymInt m = pad16(rows);
  return {at::empty_symint(with_last(x.sym_sizes(), sum_of(weights, 0)), x.options()),
          x_t ? at::empty_symint({k, m}, x.options().dtype(recipe.forward_dtype)) : none_like(x),
          x_t ? at::empty_symint(scale_sizes(recipe.granularity, k, m), fp32) : none_like(x),
          save_weight_amax && is_tensorwise(recipe) ? at::empty({}, fp32) : none_like(x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _merged_backward(
    at::TensorList dys, const OptionalTensor& /*x*/, const OptionalTensor& /*x_t_scale*/,
    at::TensorList weights, const OptionalTensor& /*weight_amax*/, c10::SymInt in_features,
    int64_t recipe, bool needs_dx, int64_t needs_dweight, bool needs_dbias,
    const OptionalTensor& history) {
  merged::check_backward(dys, weights, in_features, needs_dx, recipe, history);
  const at::Tensor& like = dys.front();
  c10::SymInt wanted = 0;
  for (size_t i = 0; i < dys.size(); ++i) {
    if (wants(needs_dweight, i)) wanted = wanted + dys[i].sym_size(-1);
  }
  return {needs_dx ? at::empty_symint(with_last(like.sym_sizes(), in_features), like.options())
                   : none_like(like),
          needs_dweight != 0 ? at::empty_symint({wanted, in_features}, like.options())
                             : none_like(like),
          needs_dbias ? at::empty_symint({sum_of(dys, -1)}, like.options()) : none_like(like)};
}

}  // namespace meta

}  // namespace fp8
