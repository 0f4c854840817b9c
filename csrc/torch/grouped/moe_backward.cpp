// The backward of moe_experts.
//
// Quantize dy once a token, to its k rows; dh = dy down; the activation's backward, which
// quantizes and also gives the routing weights' gradients (dh . h, so that down's output is not
// needed); product with gate_up; add a token's rows; then the two weight gradients, whose operands
// are gathered by routing where they are quantized.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "host/formats.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/grouped/grouped_mm.h"
#include "torch/grouped/grouped_ops.h"
#include "torch/grouped/moe_passes.h"
#include "torch/grouped/weight_gradient.h"

namespace fp8 {
namespace {

using grouped::Gate;
using grouped::Routing;

// Ends the life of a tensor's memory, whoever still refers to the tensor.
void give_back_memory(const at::Tensor& t) {
  c10::StorageImpl& storage = *t.storage().unsafeGetStorageImpl();
  storage.set_data_ptr_noswap(at::DataPtr(nullptr, t.device()));
  storage.set_nbytes(0);
}

struct MoeBackwardArgs {
  at::Tensor dy;              // [T, H]
  at::Tensor x;               // [T, H]
  at::Tensor experts;         // [T, k] int64
  at::Tensor weights;         // [T, k] fp32
  const at::Tensor& gate_up;  // [E, 2 I, H]
  const at::Tensor& down;     // [E, H, I]
  at::Tensor gate_up_bias;    // [E, 2 I], optional
  at::Tensor down_bias;       // [E, H], optional
  at::Tensor gate_up_out;     // [T * k, 2 I]
  Routing routing;
  Gate gate;
  Recipe recipe;
  int64_t wanted;                                 // bits of `needs`
  const std::optional<at::Tensor>& gate_up_amax;  // [E, H], what the forward kept
  const std::optional<at::Tensor>& down_amax;     // [E, I]
  at::Tensor gate_up_main_grad;                   // [E, 2 I, H], optional
  at::Tensor down_main_grad;                      // [E, H, I], optional

  bool needs(int64_t what) const { return (wanted & what) != 0; }
  int64_t rows() const { return experts.numel(); }
  int64_t top_k() const { return experts.size(1); }
  at::ScalarType dtype() const { return dy.scalar_type(); }
  grouped::WeightGradient of_gate_up() const {
    return weight_gradient(gate_up, gate_up_main_grad, needs(needs::kOverwriteGateUp));
  }
  grouped::WeightGradient of_down() const {
    return weight_gradient(down, down_main_grad, needs(needs::kOverwriteDown));
  }

 private:
  grouped::WeightGradient weight_gradient(const at::Tensor& weight, const at::Tensor& main_grad,
                                          bool overwrite) const {
    return {.features = weight.size(1),
            .in_features = weight.size(2),
            .transposed = is_stored_transposed(weight),
            .dtype = weight.scalar_type(),
            .fast_accum = recipe.fast_wgrad,
            .main_grad = main_grad,
            .overwrite = overwrite};
  }
};

struct Gradients {  // undefined where not asked for, or where a main_grad took it
  at::Tensor x;
  at::Tensor weights;
  at::Tensor gate_up;
  at::Tensor down;
  at::Tensor gate_up_bias;
  at::Tensor down_bias;
};

// Of no tokens.
Gradients zero_gradients(const MoeBackwardArgs& args) {
  const int64_t groups = args.down.size(0);
  Gradients grads;
  if (args.needs(needs::kX)) grads.x = at::zeros_like(args.x);
  if (args.needs(needs::kWeights)) grads.weights = at::zeros_like(args.weights);
  if (args.needs(needs::kGateUp)) grads.gate_up = args.of_gate_up().zeros(args.gate_up, groups);
  if (args.needs(needs::kDown)) grads.down = args.of_down().zeros(args.down, groups);
  if (args.needs(needs::kGateUpBias)) grads.gate_up_bias = at::zeros_like(args.gate_up_bias);
  if (args.needs(needs::kDownBias)) grads.down_bias = at::zeros_like(args.down_bias);
  return grads;
}

// What the gate's backward gives, as far as it is asked for.
struct GateGradients {
  Side quantized;          // the gradient of gate_up's product [T * k, 2 I], for that of x
  at::Tensor gate_up_out;  // the same, not quantized, for those of gate_up and its bias, or blocks
  at::Tensor weighted_h;   // [T * k, I], down's input, weighted, for the gradient of down
};

// Through down and the activation; writes the routing weights' gradient, without down's bias.
GateGradients gate_gradients(const MoeBackwardArgs& args,
                             const at::Tensor& d_weights) {  // [T, k] fp32, zeros, or undefined
  const at::Tensor& offsets = args.routing.offsets;
  const int64_t rows = args.rows();
  const int64_t features = args.down.size(2);
  at::Tensor dh;
  {
    const Side qdy = grouped::quantize_rows(args.dy, args.recipe, args.routing.place, args.top_k());
    const Side down = grouped::weight_for_dgrad(args.down, args.recipe, args.down_amax);
    dh = grouped::multiply_rows(qdy, down, offsets, args.dtype(), args.recipe.fast_dgrad);
  }
  GateGradients out;
  core::GateBackwardArgs pass{
      .gate = grouped::gate_args(args.gate, args.gate_up_out, args.gate_up_bias, offsets),
      .dh = dh.const_data_ptr(),
      .weights = args.weights.const_data_ptr<float>(),
      .source = args.routing.source.const_data_ptr<int32_t>(),
      .power_of_two = args.recipe.power_of_two};
  // Where blocks of a row hold gates and ups, no thread of the pass has seen all of a block: the
  // gradient is quantized when it is there.
  const bool blocks = is_blockwise(args.recipe.granularity);
  if (args.needs(needs::kX) && !blocks) {
    out.quantized = grouped::rows_side(args.dy, rows, 2 * features, args.recipe);
    pass.data = out.quantized.codes.mutable_data_ptr();
    pass.scale = out.quantized.scales.mutable_data_ptr<float>();
  }
  if (args.needs(needs::kGateUp | needs::kGateUpBias | (blocks ? needs::kX : 0))) {
    out.gate_up_out = args.needs(needs::kMayConsume)
                          ? args.gate_up_out
                          : empty_on(args.dy, {rows, 2 * features}, args.dtype());
    pass.d_gate_up = out.gate_up_out.mutable_data_ptr();
  }
  if (args.needs(needs::kDown)) {
    out.weighted_h = empty_on(args.dy, {rows, features}, args.dtype());
    pass.weighted_h = out.weighted_h.mutable_data_ptr();
  }
  if (d_weights.defined()) pass.d_weights = d_weights.mutable_data_ptr<float>();
  FP8_RUN_PASS(gate_backward, args.dy, pass);
  if (args.needs(needs::kX) && blocks) {
    out.quantized = grouped::quantize_rows(out.gate_up_out, args.recipe);
  }
  return out;
}

// Lets go of the gradient, which may be gate_up_out overwritten.
void drop_gate_up_out(const MoeBackwardArgs& args, GateGradients& gate) {
  gate.gate_up_out = at::Tensor();
  if (args.needs(needs::kMayConsume)) give_back_memory(args.gate_up_out);
}

// dW of gate_up and of down. What a product has read goes before the next operand is made.
void weight_gradients(const MoeBackwardArgs& args, GateGradients& gate, Gradients& grads) {
  const auto& [offsets, place, source] = args.routing;
  const grouped::WeightGradient of_gate_up = args.of_gate_up();
  const grouped::WeightGradient of_down = args.of_down();
  const int64_t top_k = args.top_k();
  const bool power_of_two = args.recipe.power_of_two;
  if (!args.recipe.fp8_wgrad) {
    if (args.needs(needs::kGateUp)) {
      grads.gate_up = of_gate_up.high_precision(gate.gate_up_out,
                                                grouped::copy_rows(args.x, place, top_k), offsets);
      drop_gate_up_out(args, gate);
    }
    if (args.needs(needs::kDown)) {
      grads.down = of_down.high_precision(grouped::copy_rows(args.dy, place, top_k),
                                          gate.weighted_h, offsets);
    }
    return;
  }
  const grouped::Tiles tiles = grouped::make_tiles(offsets, args.rows());
  if (args.needs(needs::kGateUp)) {
    const Side grad = grouped::quantize_columns(gate.gate_up_out, tiles, power_of_two);
    drop_gate_up_out(args, gate);
    grads.gate_up =
        of_gate_up.fp8(grad, grouped::quantize_columns(args.x, tiles, power_of_two, source, top_k),
                       tiles.padded_offsets);
  }
  if (args.needs(needs::kDown)) {
    const Side input = grouped::quantize_columns(gate.weighted_h, tiles, power_of_two);
    gate.weighted_h = at::Tensor();
    grads.down = of_down.fp8(grouped::quantize_columns(args.dy, tiles, power_of_two, source, top_k),
                             input, tiles.padded_offsets);
  }
}

Gradients moe_gradients(const MoeBackwardArgs& args) {
  const Routing& routing = args.routing;
  Gradients grads;
  if (args.needs(needs::kWeights)) {
    grads.weights = at::zeros(args.weights.sizes(), args.weights.options());
  }
  if (args.needs(needs::kDownBias)) {
    grads.down_bias = grouped::sum_by_expert(args.dy, routing, /*gathered=*/true, args.weights);
  }
  GateGradients gate;
  if (args.needs(needs::kX | needs::kWeights | needs::kGateUp | needs::kGateUpBias |
                 needs::kDown)) {
    gate = gate_gradients(args, grads.weights);
  }
  if (args.needs(needs::kWeights) && args.down_bias.defined()) {
    grouped::add_bias_part(args.dy, args.down_bias, args.experts, grads.weights);
  }
  if (args.needs(needs::kX)) {
    const Side gate_up = grouped::weight_for_dgrad(args.gate_up, args.recipe, args.gate_up_amax);
    const at::Tensor rows = grouped::multiply_rows(gate.quantized, gate_up, routing.offsets,
                                                   args.dtype(), args.recipe.fast_dgrad);
    gate.quantized = {};
    grads.x = grouped::combine_rows(rows, args.x.size(0), routing, {}, {}, {});
  }
  if (args.needs(needs::kGateUpBias)) {
    grads.gate_up_bias = grouped::sum_by_expert(gate.gate_up_out, routing, /*gathered=*/false, {});
  }
  if (!args.needs(needs::kGateUp)) drop_gate_up_out(args, gate);
  if (args.needs(needs::kGateUp | needs::kDown)) weight_gradients(args, gate, grads);
  return grads;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
kernel::_moe_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& top_k_index,
                      const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                      const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,
                      const std::optional<at::Tensor>& down_bias, const at::Tensor& gate_up_out,
                      const at::Tensor& offsets, const at::Tensor& place, const at::Tensor& source,
                      int64_t activation, bool interleaved, double alpha, double limit,
                      int64_t recipe_id, int64_t wanted,
                      const std::optional<at::Tensor>& gate_up_amax,
                      const std::optional<at::Tensor>& down_amax,
                      const std::optional<at::Tensor>& gate_up_main_grad,
                      const std::optional<at::Tensor>& down_main_grad) {
  check_moe_main_grads(x, gate_up, down, gate_up_main_grad, down_main_grad);
  const c10::DeviceGuard guard(dy.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const MoeBackwardArgs args{
      .dy = dy.contiguous(),
      .x = x.contiguous(),
      .experts = top_k_index.contiguous(),
      .weights = top_k_weights.to(at::kFloat).contiguous(),
      .gate_up = gate_up,
      .down = down,
      .gate_up_bias = grouped::contiguous(gate_up_bias),
      .down_bias = grouped::contiguous(down_bias),
      .gate_up_out = gate_up_out,
      .routing = {offsets, place, source},
      .gate = {static_cast<core::Activation>(activation), interleaved, alpha, limit},
      .recipe = grouped_recipe_at(recipe_id),
      .wanted = wanted,
      .gate_up_amax = gate_up_amax,
      .down_amax = down_amax,
      .gate_up_main_grad = gate_up_main_grad.value_or(at::Tensor()),
      .down_main_grad = down_main_grad.value_or(at::Tensor())};
  Gradients grads = args.experts.numel() == 0 ? zero_gradients(args) : moe_gradients(args);
  return {or_none(grads.x, dy),    or_none(grads.weights, dy),      or_none(grads.gate_up, dy),
          or_none(grads.down, dy), or_none(grads.gate_up_bias, dy), or_none(grads.down_bias, dy)};
}

}  // namespace fp8
