// The shapes of mlp's private ops, for fake tensors.
#include <ATen/ATen.h>

#include "torch/common/tensors.h"
#include "torch/linear/steps.h"
#include "torch/mlp/mlp.h"
#include "torch/mlp/saves.h"

namespace fp8 {

using linear::OptionalTensor;
using mlp_node::Form;
using mlp_node::is_tensorwise;
using mlp_node::Saves;

namespace meta {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_mlp_forward(const at::Tensor& x, const at::Tensor& gate, const OptionalTensor& up,
             const at::Tensor& down, const OptionalTensor& gate_bias, const OptionalTensor& up_bias,
             const OptionalTensor& down_bias, int64_t activation, bool /*gate_second*/,
             double /*alpha*/, double /*limit*/, int64_t recipe_id, int64_t needs,
             const OptionalTensor& gate_history, const OptionalTensor& up_history,
             const OptionalTensor& down_history) {
  check_mlp(x, gate, up, down, gate_bias, up_bias, down_bias, activation, recipe_id, gate_history,
            up_history, down_history);
  const Recipe recipe = recipe_at(recipe_id);
  const Saves saves(needs);
  const bool tensorwise = is_tensorwise(recipe);
  const auto fp32 = x.options().dtype(at::kFloat);
  std::vector<c10::SymInt> sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = down.sym_size(0);
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  const auto amax = [&](bool keep) {
    return keep && tensorwise ? at::empty({}, fp32) : none_like(x);
  };
  const c10::SymInt m = pad16(rows);
  const auto out = [&](bool keep, const at::Tensor& weight) {
    if (!keep) return none_like(x);
    const c10::SymInt cols = weight.sym_size(0);
    return saves.fp8 ? at::empty_symint({m, pad16(cols)}, x.options().dtype(at::kFloat8_e4m3fn))
                     : at::empty_symint({rows, cols}, x.options());
  };
  const auto out_scale = [&](bool keep) {
    return keep && saves.fp8 ? at::empty_symint({m}, fp32) : none_like(x);
  };
  const bool x_t = saves.x && recipe.fp8_wgrad;
  const c10::SymInt k = pad16(x.sym_size(-1));
  return {at::empty_symint(sizes, x.options()),
          out(saves.products, gate),
          up ? out(saves.products, *up) : none_like(x),
          out_scale(true),
          out_scale(up.has_value()),
          x_t ? at::empty_symint({k, m}, x.options().dtype(recipe.forward_dtype)) : none_like(x),
          x_t ? at::empty_symint(scale_sizes(recipe.granularity, k, m), fp32) : none_like(x),
          amax(saves.recompute),
          amax(saves.weights),
          amax(saves.weights && up),
          amax(saves.to_h),
          amax((needs & mlp_needs::kDown) != 0)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_mlp_backward(const at::Tensor& dy, const OptionalTensor& /*x*/,
              const OptionalTensor& /*x_t_scale*/, const OptionalTensor& /*gate_out*/,
              const OptionalTensor& /*up_out*/, const OptionalTensor& /*gate_out_scale*/,
              const OptionalTensor& /*up_out_scale*/, const OptionalTensor& /*gate*/,
              const OptionalTensor& /*up*/, const OptionalTensor& /*down*/,
              const OptionalTensor& /*gate_bias*/, const OptionalTensor& /*up_bias*/,
              const OptionalTensor& /*x_amax*/, const OptionalTensor& /*gate_amax*/,
              const OptionalTensor& /*up_amax*/, const OptionalTensor& /*down_amax*/,
              const OptionalTensor& /*h_amax*/, c10::SymInt in_features, c10::SymInt features,
              int64_t form, int64_t /*activation*/, bool /*gate_second*/, double /*alpha*/,
              double /*limit*/, int64_t /*recipe*/, int64_t needs,
              const OptionalTensor& /*gate_history*/, const OptionalTensor& /*up_history*/,
              const OptionalTensor& /*down_history*/) {
  const c10::SymInt out_features = dy.sym_size(-1);
  const c10::SymInt gate_features =
      static_cast<Form>(form) == Form::kMerged ? 2 * features : features;
  const auto wanted = [&](int64_t bit, std::vector<c10::SymInt> sizes) {
    return (needs & bit) != 0 ? at::empty_symint(sizes, dy.options()) : none_like(dy);
  };
  std::vector<c10::SymInt> of_x(dy.sym_sizes().begin(), dy.sym_sizes().end());
  of_x.back() = in_features;
  return {wanted(mlp_needs::kX, of_x),
          wanted(mlp_needs::kGate, {gate_features, in_features}),
          wanted(mlp_needs::kUp, {features, in_features}),
          wanted(mlp_needs::kDown, {out_features, features}),
          wanted(mlp_needs::kGateBias, {gate_features}),
          wanted(mlp_needs::kUpBias, {features}),
          wanted(mlp_needs::kDownBias, {out_features})};
}

}  // namespace meta

}  // namespace fp8
