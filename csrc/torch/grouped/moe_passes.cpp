#include "torch/grouped/moe_passes.h"

#include <ATen/ATen.h>

#include "torch/common/tensors.h"
#include "torch/grouped/operands.h"

namespace fp8::grouped {

Routing sort_by_expert(const at::Tensor& experts, int64_t groups) {
  const int64_t slots = experts.numel();
  Routing routing{empty_on(experts, {groups}, at::kInt), empty_on(experts, {slots}, at::kInt),
                  empty_on(experts, {slots}, at::kInt)};
  core::RouteArgs args{.experts = experts.const_data_ptr<int64_t>(),
                       .slots = slots,
                       .groups = groups,
                       .offsets = routing.offsets.mutable_data_ptr<int32_t>(),
                       .place = routing.place.mutable_data_ptr<int32_t>(),
                       .source = routing.source.mutable_data_ptr<int32_t>()};
  at::Tensor workspace;
  if (experts.is_cuda()) {
    workspace = empty_on(experts, {core::route_workspace_words(args)}, at::kInt);
    args.workspace = workspace.mutable_data_ptr<int32_t>();
  }
  FP8_RUN_PASS(route, experts, args);
  return routing;
}

core::GateArgs gate_args(const Gate& gate, const at::Tensor& gate_up_out, const at::Tensor& bias,
                         const at::Tensor& offsets) {
  return {.gate_up = gate_up_out.const_data_ptr(),
          .dtype = to_core(gate_up_out.scalar_type()),
          .rows = gate_up_out.size(0),
          .features = gate_up_out.size(1) / 2,
          .groups = offsets.size(0),
          .offsets = offsets.const_data_ptr<int32_t>(),
          .bias = bias.defined() ? bias.const_data_ptr() : nullptr,
          .activation = gate.activation,
          .interleaved = gate.interleaved,
          .alpha = static_cast<float>(gate.alpha),
          .limit = static_cast<float>(gate.limit)};
}

Side gated_rows(const Gate& gate, const at::Tensor& gate_up_out, const at::Tensor& bias,
                const at::Tensor& offsets, const Recipe& recipe) {
  const Side rows = rows_side(gate_up_out, gate_up_out.size(0), gate_up_out.size(1) / 2, recipe);
  const core::GateForwardArgs args{.gate = gate_args(gate, gate_up_out, bias, offsets),
                                   .data = rows.codes.mutable_data_ptr(),
                                   .scale = rows.scales.mutable_data_ptr<float>(),
                                   .granularity = recipe.granularity,
                                   .power_of_two = recipe.power_of_two};
  FP8_RUN_PASS(gate_forward, gate_up_out, args);
  return rows;
}

at::Tensor combine_rows(const at::Tensor& rows, int64_t tokens, const Routing& routing,
                        const at::Tensor& weights, const at::Tensor& experts,
                        const at::Tensor& bias) {
  at::Tensor out = empty_on(rows, {tokens, rows.size(1)}, rows.scalar_type());
  const core::CombineArgs args{
      .x = rows.const_data_ptr(),
      .dtype = to_core(rows.scalar_type()),
      .tokens = tokens,
      .top_k = routing.place.numel() / tokens,
      .cols = rows.size(1),
      .groups = routing.offsets.size(0),
      .offsets = routing.offsets.const_data_ptr<int32_t>(),
      .place = routing.place.const_data_ptr<int32_t>(),
      .weights = weights.defined() ? weights.const_data_ptr<float>() : nullptr,
      .experts = experts.defined() ? experts.const_data_ptr<int64_t>() : nullptr,
      .bias = bias.defined() ? bias.const_data_ptr() : nullptr,
      .out = out.mutable_data_ptr()};
  FP8_RUN_PASS(combine, rows, args);
  return out;
}

at::Tensor sum_by_expert(const at::Tensor& x, const Routing& routing, bool gathered,
                         const at::Tensor& weights) {
  const int64_t groups = routing.offsets.size(0);
  at::Tensor out = empty_on(x, {groups, x.size(1)}, x.scalar_type());
  const core::GroupSumsArgs args{
      .x = x.const_data_ptr(),
      .dtype = to_core(x.scalar_type()),
      .cols = x.size(1),
      .ld = x.size(1),
      .groups = groups,
      .offsets = routing.offsets.const_data_ptr<int32_t>(),
      .source = gathered ? routing.source.const_data_ptr<int32_t>() : nullptr,
      .copies = gathered ? routing.source.numel() / x.size(0) : 1,
      .weights = weights.defined() ? weights.const_data_ptr<float>() : nullptr,
      .out = out.mutable_data_ptr()};
  FP8_RUN_PASS(group_sums, x, args);
  return out;
}

void add_bias_part(const at::Tensor& dy, const at::Tensor& down_bias, const at::Tensor& experts,
                   const at::Tensor& d_weights) {
  const int64_t last = down_bias.size(0) - 1;
  // Not in 16 bits on a CPU, where torch 2.11's product spreads a NaN to the row before.
  const auto wide = [](const at::Tensor& t) { return t.is_cpu() ? t.to(at::kFloat) : t; };
  const at::Tensor dot =
      at::mm(wide(dy), wide(down_bias).t()).to(at::kFloat).gather(1, experts.clamp(0, last));
  d_weights.add_(dot.masked_fill_(experts.lt(0).logical_or_(experts.gt(last)), 0));
}

at::Tensor contiguous(const std::optional<at::Tensor>& t) {
  if (!t || !t->defined()) return {};
  const at::Tensor c = t->contiguous();
  return on_16_bytes(c) ? c : c.clone();
}

}  // namespace fp8::grouped
