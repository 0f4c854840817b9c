// What experts_frozen refuses, and how it reads the shapes of scales: the part that needs no data.
#include <ATen/ATen.h>

#include "torch/common/tensors.h"
#include "torch/experts/experts_frozen.h"
#include "torch/grouped/grouped_ops.h"

namespace fp8 {
namespace {

constexpr const char* kExpertsOp = "experts_frozen";

c10::SymInt blocks_along(const c10::SymInt& extent) {
  return (extent + (core::kScaleBlock - 1)) / core::kScaleBlock;
}

bool has_sizes(const at::Tensor& t, std::initializer_list<c10::SymInt> sizes) {
  return t.sym_sizes() == c10::SymIntArrayRef(sizes.begin(), sizes.size());
}

bool is_grid(const at::Tensor& weight, const at::Tensor& scale) {
  return has_sizes(scale, {weight.sym_size(0), blocks_along(weight.sym_size(1)),
                           blocks_along(weight.sym_size(2))});
}

// One for each expert, or for each row of each.
bool is_of_rows(const at::Tensor& weight, const at::Tensor& scale) {
  const c10::SymInt& groups = weight.sym_size(0);
  const c10::SymInt& rows = weight.sym_size(1);
  return has_sizes(scale, {groups}) || has_sizes(scale, {groups, 1}) ||
         has_sizes(scale, {groups, 1, 1}) || has_sizes(scale, {groups, rows}) ||
         has_sizes(scale, {groups, rows, 1});
}

void check_weight(const char* name, const at::Tensor& weight, const at::Tensor& scale) {
  FP8_CHECK_TYPE(weight.scalar_type() == at::kFloat8_e4m3fn, "fp8::", kExpertsOp, ": expected ",
                 name, " in float8_e4m3fn, got ", weight.scalar_type());
  FP8_CHECK_TYPE(scale.scalar_type() == at::kFloat, "fp8::", kExpertsOp, ": expected ", name,
                 "_scale in float32, got ", scale.scalar_type());
  FP8_CHECK_SAME_DEVICE(kExpertsOp, "the scale", scale, name, weight);
}

void check_scale(const char* name, const at::Tensor& weight, const at::Tensor& scale, bool blocks) {
  const c10::SymInt& groups = weight.sym_size(0);
  if (blocks) {
    FP8_CHECK_VALUE(is_grid(weight, scale), "fp8::", kExpertsOp, ": expected ", name,
                    "_scale of shape [", groups, ", ", blocks_along(weight.sym_size(1)), ", ",
                    blocks_along(weight.sym_size(2)), "] (one for each 128x128 block) for ", name,
                    " ", weight.sym_sizes(), ", got shape ", scale.sym_sizes());
    return;
  }
  FP8_CHECK_VALUE(is_of_rows(weight, scale), "fp8::", kExpertsOp, ": expected ", name,
                  "_scale of shape [", groups, "] (one for each expert), [", groups, ", ",
                  weight.sym_size(1), ", 1] (for each row), or, of both weights, [", groups, ", ",
                  blocks_along(weight.sym_size(1)), ", ", blocks_along(weight.sym_size(2)),
                  "] (for each 128x128 block) for ", name, " ", weight.sym_sizes(), ", got shape ",
                  scale.sym_sizes());
}

}  // namespace

bool experts::checked_blocks(const at::Tensor& x, const at::Tensor& top_k_index,
                             const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                             const at::Tensor& gate_up_scale, const at::Tensor& down,
                             const at::Tensor& down_scale, const OptionalTensor& gate_up_bias,
                             const OptionalTensor& down_bias,
                             std::optional<std::string_view> input_granularity) {
  check_weight("gate_up", gate_up, gate_up_scale);
  check_weight("down", down, down_scale);
  check_mixture(kExpertsOp, x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias);
  FP8_CHECK_VALUE(
      !input_granularity || *input_granularity == "rowwise" || *input_granularity == "blockwise",
      "fp8::", kExpertsOp, ": expected input_granularity None, 'rowwise' or 'blockwise', got '",
      *input_granularity, "'");
  const bool blocks = input_granularity
                          ? *input_granularity == "blockwise"
                          : is_grid(gate_up, gate_up_scale) && is_grid(down, down_scale);
  check_scale("gate_up", gate_up, gate_up_scale, blocks);
  check_scale("down", down, down_scale, blocks);
  return blocks;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
meta::_experts_frozen_forward(const at::Tensor& x, const at::Tensor& top_k_index,
                              const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                              const at::Tensor& gate_up_scale, const at::Tensor& down,
                              const at::Tensor& down_scale, const OptionalTensor& gate_up_bias,
                              const OptionalTensor& down_bias, int64_t /*activation*/,
                              bool /*interleaved*/, double /*alpha*/, double /*limit*/, bool blocks,
                              bool /*power_of_two*/) {
  experts::checked_blocks(x, top_k_index, top_k_weights, gate_up, gate_up_scale, down, down_scale,
                          gate_up_bias, down_bias, blocks ? "blockwise" : "rowwise");
  const c10::SymInt rows = top_k_index.sym_numel();
  const auto ints = x.options().dtype(at::kInt);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint({rows, gate_up.sym_size(1)}, x.options()),
          at::empty_symint({gate_up.sym_size(0)}, ints), at::empty_symint({rows}, ints),
          at::empty_symint({rows}, ints)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> meta::_experts_frozen_backward(
    const at::Tensor& dy, const at::Tensor& top_k_index, const at::Tensor& /*top_k_weights*/,
    const at::Tensor& /*gate_up*/, const at::Tensor& /*gate_up_scale*/, const at::Tensor& /*down*/,
    const at::Tensor& /*down_scale*/, const OptionalTensor& gate_up_bias,
    const OptionalTensor& down_bias, const at::Tensor& /*gate_up_out*/,
    const at::Tensor& /*offsets*/, const at::Tensor& /*place*/, const at::Tensor& /*source*/,
    int64_t /*activation*/, bool /*interleaved*/, double /*alpha*/, double /*limit*/,
    bool /*blocks*/, bool /*power_of_two*/, int64_t wanted) {
  const auto bias_like = [&](int64_t what, const OptionalTensor& bias) {
    return bias && (wanted & what) != 0 ? at::empty_symint(bias->sym_sizes(), bias->options())
                                        : none_like(dy);
  };
  return {
      (wanted & needs::kX) != 0 ? at::empty_symint(dy.sym_sizes(), dy.options()) : none_like(dy),
      (wanted & needs::kWeights) != 0
          ? at::empty_symint(top_k_index.sym_sizes(), dy.options().dtype(at::kFloat))
          : none_like(dy),
      bias_like(needs::kGateUpBias, gate_up_bias), bias_like(needs::kDownBias, down_bias)};
}

}  // namespace fp8
