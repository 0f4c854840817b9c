// The backward of experts_frozen: gradients of x, of the routing weights and of the biases, on the
// forward's own codes.
//
// dh = dy down: dy's rows times the scales of down's rows, quantized with a scale for each row,
// times the transposed codes. With a scale for each expert, or in 128x128 blocks, dy is quantized
// as it is, once a token, with a scale for each row or in blocks of 1x128, and the scales go with
// the transposed codes. Then the activation's backward, and the same way through gate_up. Each
// product makes a copy of its codes, transposed.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/tensors.h"
#include "torch/experts/experts_frozen.h"
#include "torch/grouped/grouped_mm.h"
#include "torch/grouped/grouped_ops.h"

namespace fp8 {
namespace {

using grouped::Gate;
using grouped::Routing;

struct FrozenBackwardArgs {
  at::Tensor dy;       // [T, H]
  at::Tensor experts;  // [T, k] int64
  at::Tensor weights;  // [T, k] fp32
  const at::Tensor& gate_up;
  const at::Tensor& gate_up_scale;
  const at::Tensor& down;
  const at::Tensor& down_scale;
  at::Tensor gate_up_bias;  // [E, 2 I], optional
  at::Tensor down_bias;     // [E, H], optional
  at::Tensor gate_up_out;   // [T * k, 2 I]
  Routing routing;
  Gate gate;
  bool blocks;
  Recipe recipe;
  int64_t wanted;  // bits of `needs`

  bool needs(int64_t what) const { return (wanted & what) != 0; }
  // Whether a scale of the weight is to be multiplied with rows before they are quantized.
  bool of_rows(const at::Tensor& scale) const {
    return !blocks && scale.numel() != routing.offsets.size(0);
  }
};

struct FrozenGradients {  // undefined where not asked for
  at::Tensor x;
  at::Tensor weights;
  at::Tensor gate_up_bias;
  at::Tensor down_bias;
};

at::Tensor multiply_frozen(const FrozenBackwardArgs& args, const Side& side,
                           const at::Tensor& codes, const at::Tensor& scale) {
  return grouped::multiply_rows(side, experts::transposed_side(codes, scale, args.blocks),
                                args.routing.offsets, args.dy.scalar_type(),
                                args.recipe.fast_dgrad);
}

// rows [T * k, N] through a weight [E, N, K]: [T * k, K].
at::Tensor through(const FrozenBackwardArgs& args, const at::Tensor& rows, const at::Tensor& codes,
                   const at::Tensor& scale) {
  const at::Tensor scaled =
      args.of_rows(scale) ? experts::times_scales(rows, scale, args.routing, args.experts) : rows;
  return multiply_frozen(args, grouped::quantize_rows(scaled, args.recipe), codes, scale);
}

// The gradient of down's input, before the routing weights.
at::Tensor gradient_of_h(const FrozenBackwardArgs& args) {
  const int64_t top_k = args.experts.size(1);
  const at::Tensor& place = args.routing.place;
  if (args.of_rows(args.down_scale)) {
    return through(args, grouped::copy_rows(args.dy, place, top_k), args.down, args.down_scale);
  }
  const Side qdy = grouped::quantize_rows(args.dy, args.recipe, place, top_k);
  return multiply_frozen(args, qdy, args.down, args.down_scale);
}

// Through the activation: the gradient of gate_up's product; and the routing weights', without
// down's bias.
at::Tensor gradient_of_gate_up(const FrozenBackwardArgs& args, const at::Tensor& dh,
                               const at::Tensor& d_weights) {  // [T, k] fp32, zeros, or undefined
  at::Tensor out;
  core::GateBackwardArgs pass{.gate = grouped::gate_args(args.gate, args.gate_up_out,
                                                         args.gate_up_bias, args.routing.offsets),
                              .dh = dh.const_data_ptr(),
                              .weights = args.weights.const_data_ptr<float>(),
                              .source = args.routing.source.const_data_ptr<int32_t>(),
                              .power_of_two = args.recipe.power_of_two};
  if (args.needs(needs::kX | needs::kGateUpBias)) {
    out = empty_on(args.dy, args.gate_up_out.sizes(), args.dy.scalar_type());
    pass.d_gate_up = out.mutable_data_ptr();
  }
  if (d_weights.defined()) pass.d_weights = d_weights.mutable_data_ptr<float>();
  FP8_RUN_PASS(gate_backward, args.dy, pass);
  return out;
}

FrozenGradients frozen_gradients(const FrozenBackwardArgs& args) {
  const Routing& routing = args.routing;
  FrozenGradients grads;
  if (args.needs(needs::kWeights)) {
    grads.weights = at::zeros(args.weights.sizes(), args.weights.options());
  }
  if (args.needs(needs::kDownBias)) {
    grads.down_bias = grouped::sum_by_expert(args.dy, routing, /*gathered=*/true, args.weights);
  }
  if (!args.needs(needs::kX | needs::kWeights | needs::kGateUpBias)) return grads;
  const at::Tensor d_gate_up = gradient_of_gate_up(args, gradient_of_h(args), grads.weights);
  if (args.needs(needs::kWeights) && args.down_bias.defined()) {
    grouped::add_bias_part(args.dy, args.down_bias, args.experts, grads.weights);
  }
  if (args.needs(needs::kGateUpBias)) {
    grads.gate_up_bias = grouped::sum_by_expert(d_gate_up, routing, /*gathered=*/false, {});
  }
  if (args.needs(needs::kX)) {
    const at::Tensor rows = through(args, d_gate_up, args.gate_up, args.gate_up_scale);
    grads.x = grouped::combine_rows(rows, args.dy.size(0), routing, {}, {}, {});
  }
  return grads;
}

FrozenGradients zero_frozen_gradients(const FrozenBackwardArgs& args) {
  FrozenGradients grads;
  if (args.needs(needs::kX)) grads.x = at::zeros_like(args.dy);
  if (args.needs(needs::kWeights)) grads.weights = at::zeros_like(args.weights);
  if (args.needs(needs::kGateUpBias)) grads.gate_up_bias = at::zeros_like(args.gate_up_bias);
  if (args.needs(needs::kDownBias)) grads.down_bias = at::zeros_like(args.down_bias);
  return grads;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kernel::_experts_frozen_backward(
    const at::Tensor& dy, const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
    const at::Tensor& gate_up, const at::Tensor& gate_up_scale, const at::Tensor& down,
    const at::Tensor& down_scale, const OptionalTensor& gate_up_bias,
    const OptionalTensor& down_bias, const at::Tensor& gate_up_out, const at::Tensor& offsets,
    const at::Tensor& place, const at::Tensor& source, int64_t activation, bool interleaved,
    double alpha, double limit, bool blocks, bool power_of_two, int64_t wanted) {
  const c10::DeviceGuard guard(dy.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const FrozenBackwardArgs args{
      .dy = dy.contiguous(),
      .experts = top_k_index.contiguous(),
      .weights = experts::in_float(top_k_weights).contiguous(),
      .gate_up = gate_up,
      .gate_up_scale = gate_up_scale,
      .down = down,
      .down_scale = down_scale,
      .gate_up_bias = grouped::contiguous(gate_up_bias),
      .down_bias = grouped::contiguous(down_bias),
      .gate_up_out = gate_up_out,
      .routing = {offsets, place, source},
      .gate = {static_cast<core::Activation>(activation), interleaved, alpha, limit},
      .blocks = blocks,
      .recipe = experts::recipe_of(blocks, power_of_two),
      .wanted = wanted};
  const FrozenGradients grads =
      args.experts.numel() == 0 ? zero_frozen_gradients(args) : frozen_gradients(args);
  return {or_none(grads.x, dy), or_none(grads.weights, dy), or_none(grads.gate_up_bias, dy),
          or_none(grads.down_bias, dy)};
}

}  // namespace fp8
