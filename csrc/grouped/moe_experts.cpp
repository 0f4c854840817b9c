// moe_experts: the experts of a mixture with the routing given, forward and backward.
//
// forward: sort slots by expert; quantize x once a token and write its codes to its k rows; product
// with gate_up; activation and quantization; product with down; weight and add a token's rows.
//
// backward: quantize dy once a token, to its k rows; dh = dy down; the activation's backward, which
// quantizes and also gives the routing weights' gradients (dh . h, so that down's output is not
// needed); product with gate_up; add a token's rows; then the two weight gradients, whose operands
// are gathered by routing where they are quantized.
//
// Saved for the backward: x, which the router keeps alive too, the first product, and the routing:
// 4 I bytes a row of bf16 where the composition of ATen's ops keeps about 4 H + 8 I. The product's
// gradient takes its place where the graph is not kept. Weight gradients come last, when that and
// the quantized weights are gone.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "common/recipe.h"
#include "common/tensors.h"
#include "grouped/grouped_mm.h"
#include "grouped/grouped_ops.h"

namespace fp8 {
namespace {

at::Tensor none_like(const at::Tensor& x) {
  return x.is_meta() ? at::empty({0}, x.options()) : empty_on(x, {0}, x.scalar_type());
}

struct Routing {
  at::Tensor offsets;
  at::Tensor place;
  at::Tensor source;
};

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
#ifdef FP8_WITH_CUDA
  if (experts.is_cuda()) {
    workspace = empty_on(experts, {core::route_workspace_words(args)}, at::kInt);
    args.workspace = workspace.mutable_data_ptr<int32_t>();
  }
#endif
  FP8_RUN_PASS(route, experts, args);
  return routing;
}

struct Gate {
  core::Activation activation;
  bool interleaved;
  double alpha;
  double limit;
};

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

// A token's rows added up; weights, experts and bias may be undefined.
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

// Per expert: the sum of its rows of x, or of the rows that its slots come from, weighted.
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

// dW of one product from its output's gradient and its input, stored as `weight` is.
struct WeightGradient {
  const at::Tensor& weight;
  const Recipe& recipe;
  const at::Tensor& offsets;

  at::Tensor fp8(const grouped::Operand& grad, const grouped::Operand& input,
                 const grouped::Tiles& tiles) const {
    const bool transposed = grouped::is_stored_transposed(weight);
    const at::Tensor stored =
        grouped::multiply_columns(transposed ? input : grad, transposed ? grad : input,
                                  tiles.padded_offsets, weight.scalar_type(), recipe.fast_wgrad);
    return transposed ? stored.transpose(1, 2) : stored;
  }
  at::Tensor high_precision(const at::Tensor& grad, const at::Tensor& input) const {
    return grouped::is_stored_transposed(weight)
               ? grouped::multiply_high_precision(input, grad, offsets).transpose(1, 2)
               : grouped::multiply_high_precision(grad, input, offsets);
  }
};

at::Tensor zeros_stored_like(const at::Tensor& weight) {
  return grouped::is_stored_transposed(weight)
             ? at::zeros_symint(weight.transpose(1, 2).sym_sizes(), weight.options())
                   .transpose(1, 2)
             : at::zeros_symint(weight.sym_sizes(), weight.options());
}

// For vector loads: contiguous on 16 bytes.
at::Tensor contiguous(const std::optional<at::Tensor>& t) {
  if (!t || !t->defined()) return {};
  const at::Tensor c = t->contiguous();
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : c.clone();
}

// Ends the life of a tensor's memory, whoever still refers to the tensor.
void give_back_memory(const at::Tensor& t) {
  c10::StorageImpl& storage = *t.storage().unsafeGetStorageImpl();
  storage.set_data_ptr_noswap(at::DataPtr(nullptr, t.device()));
  storage.set_nbytes(0);
}

}  // namespace

namespace kernel {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _moe_forward(
    const at::Tensor& given_x, const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
    const at::Tensor& gate_up, const at::Tensor& down,
    const std::optional<at::Tensor>& given_gate_up_bias,
    const std::optional<at::Tensor>& given_down_bias, int64_t activation, bool interleaved,
    double alpha, double limit, int64_t recipe_id) {
  check_moe_experts(given_x, top_k_index, top_k_weights, gate_up, down, given_gate_up_bias,
                    given_down_bias);
  const Recipe recipe = grouped_recipe_at(recipe_id);
  const c10::DeviceGuard guard(given_x.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor x = as_matrix(given_x);
  const at::ScalarType dtype = x.scalar_type();
  const at::Tensor experts = top_k_index.contiguous();
  const at::Tensor weights = top_k_weights.to(at::kFloat).contiguous();
  const int64_t tokens = x.size(0);
  const int64_t top_k = experts.size(1);
  const int64_t groups = gate_up.size(0);
  const int64_t features = down.size(2);
  if (experts.numel() == 0) {
    const auto ints = x.options().dtype(at::kInt);
    return {at::zeros_like(x, at::MemoryFormat::Contiguous),
            at::empty({0, 2 * features}, x.options()), at::zeros({groups}, ints),
            at::empty({0}, ints), at::empty({0}, ints)};
  }
  const at::Tensor gate_up_bias = contiguous(given_gate_up_bias);
  const at::Tensor down_bias = contiguous(given_down_bias);
  const Routing routing = sort_by_expert(experts, groups);

  at::Tensor gate_up_out;
  {
    const grouped::Operand qx =
        grouped::quantize_rows(x, recipe.power_of_two, routing.place, top_k);
    gate_up_out =
        grouped::multiply_rows(qx, grouped::weight_for_fprop(gate_up, recipe.power_of_two),
                               routing.offsets, dtype, recipe.fast_fprop);
  }
  const Gate gate{static_cast<core::Activation>(activation), interleaved, alpha, limit};
  grouped::Operand qh{empty_on(x, {gate_up_out.size(0), features}, at::kFloat8_e4m3fn),
                      empty_on(x, {gate_up_out.size(0)}, at::kFloat)};
  const core::GateForwardArgs args{
      .gate = gate_args(gate, gate_up_out, gate_up_bias, routing.offsets),
      .data = qh.data.mutable_data_ptr(),
      .scale = qh.scale.mutable_data_ptr<float>(),
      .power_of_two = recipe.power_of_two};
  FP8_RUN_PASS(gate_forward, x, args);
  const at::Tensor out =
      grouped::multiply_rows(qh, grouped::weight_for_fprop(down, recipe.power_of_two),
                             routing.offsets, dtype, recipe.fast_fprop);
  const at::Tensor y = combine_rows(out, tokens, routing, weights, experts, down_bias);
  return {y, gate_up_out, routing.offsets, routing.place, routing.source};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _moe_backward(
    const at::Tensor& given_dy, const at::Tensor& given_x, const at::Tensor& top_k_index,
    const at::Tensor& top_k_weights, const at::Tensor& gate_up, const at::Tensor& down,
    const std::optional<at::Tensor>& given_gate_up_bias,
    const std::optional<at::Tensor>& given_down_bias, const at::Tensor& gate_up_out,
    const at::Tensor& offsets, const at::Tensor& place, const at::Tensor& source,
    int64_t activation, bool interleaved, double alpha, double limit, int64_t recipe_id,
    int64_t wanted) {
  const Recipe recipe = grouped_recipe_at(recipe_id);
  const c10::DeviceGuard guard(given_dy.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor dy = given_dy.contiguous();
  const at::Tensor x = given_x.contiguous();
  const at::ScalarType dtype = dy.scalar_type();
  const at::Tensor experts = top_k_index.contiguous();
  const at::Tensor weights = top_k_weights.to(at::kFloat).contiguous();
  const int64_t tokens = x.size(0);
  const int64_t rows = experts.numel();
  const int64_t top_k = experts.size(1);
  const int64_t features = down.size(2);
  const Routing routing{offsets, place, source};
  const auto needed = [&](int64_t what) { return (wanted & what) != 0; };

  const bool consumes = needed(needs::kMayConsume);

  at::Tensor dx = none_like(dy);
  at::Tensor d_weights = none_like(dy);
  at::Tensor d_gate_up = none_like(dy);
  at::Tensor d_down = none_like(dy);
  at::Tensor d_gate_up_bias = none_like(dy);
  at::Tensor d_down_bias = none_like(dy);
  if (rows == 0) {
    if (needed(needs::kX)) dx = at::zeros_like(x);
    if (needed(needs::kWeights)) d_weights = at::zeros_like(weights);
    if (needed(needs::kGateUp)) d_gate_up = zeros_stored_like(gate_up);
    if (needed(needs::kDown)) d_down = zeros_stored_like(down);
    if (needed(needs::kGateUpBias)) d_gate_up_bias = at::zeros_like(*given_gate_up_bias);
    if (needed(needs::kDownBias)) d_down_bias = at::zeros_like(*given_down_bias);
    return {dx, d_weights, d_gate_up, d_down, d_gate_up_bias, d_down_bias};
  }
  const at::Tensor gate_up_bias = contiguous(given_gate_up_bias);
  const at::Tensor down_bias = contiguous(given_down_bias);
  if (needed(needs::kWeights)) d_weights = at::zeros({tokens, top_k}, weights.options());
  if (needed(needs::kDownBias))
    d_down_bias = sum_by_expert(dy, routing, /*gathered=*/true, weights);

  // Through down and the activation. Only down's bias does without.
  grouped::Operand qd;
  at::Tensor d_gate_up_out;
  at::Tensor weighted_h;
  if ((wanted &
       (needs::kX | needs::kWeights | needs::kGateUp | needs::kGateUpBias | needs::kDown)) != 0) {
    at::Tensor dh;
    {
      const grouped::Operand qdy = grouped::quantize_rows(dy, recipe.power_of_two, place, top_k);
      dh = grouped::multiply_rows(qdy, grouped::weight_for_dgrad(down, recipe.power_of_two),
                                  offsets, dtype, recipe.fast_dgrad);
    }
    const Gate gate{static_cast<core::Activation>(activation), interleaved, alpha, limit};
    core::GateBackwardArgs args{.gate = gate_args(gate, gate_up_out, gate_up_bias, offsets),
                                .dh = dh.const_data_ptr(),
                                .weights = weights.const_data_ptr<float>(),
                                .source = source.const_data_ptr<int32_t>(),
                                .power_of_two = recipe.power_of_two};
    if (needed(needs::kX)) {
      qd = {empty_on(dy, {rows, 2 * features}, at::kFloat8_e4m3fn),
            empty_on(dy, {rows}, at::kFloat)};
      args.data = qd.data.mutable_data_ptr();
      args.scale = qd.scale.mutable_data_ptr<float>();
    }
    if (needed(needs::kGateUp) || needed(needs::kGateUpBias)) {
      d_gate_up_out = consumes ? gate_up_out : empty_on(dy, {rows, 2 * features}, dtype);
      args.d_gate_up = d_gate_up_out.mutable_data_ptr();
    }
    if (needed(needs::kDown)) {
      weighted_h = empty_on(dy, {rows, features}, dtype);
      args.weighted_h = weighted_h.mutable_data_ptr();
    }
    if (needed(needs::kWeights)) args.d_weights = d_weights.mutable_data_ptr<float>();
    FP8_RUN_PASS(gate_backward, dy, args);
  }
  // d_gate_up_out may be gate_up_out overwritten.
  const auto drop_gate_up_out = [&] {
    d_gate_up_out = at::Tensor();
    if (consumes) give_back_memory(gate_up_out);
  };
  if (needed(needs::kWeights) && down_bias.defined()) {
    const int64_t last = down.size(0) - 1;
    const at::Tensor dot =
        at::mm(dy, down_bias.t()).to(at::kFloat).gather(1, experts.clamp(0, last));
    d_weights.add_(dot.masked_fill_(experts.lt(0).logical_or_(experts.gt(last)), 0));
  }
  if (needed(needs::kX)) {
    const at::Tensor dx_rows =
        grouped::multiply_rows(qd, grouped::weight_for_dgrad(gate_up, recipe.power_of_two), offsets,
                               dtype, recipe.fast_dgrad);
    qd = {};
    dx = combine_rows(dx_rows, tokens, routing, {}, {}, {});
  }
  if (needed(needs::kGateUpBias)) {
    d_gate_up_bias = sum_by_expert(d_gate_up_out, routing, /*gathered=*/false, {});
  }
  if (!needed(needs::kGateUp)) drop_gate_up_out();

  if (!needed(needs::kGateUp) && !needed(needs::kDown)) {
    return {dx, d_weights, d_gate_up, d_down, d_gate_up_bias, d_down_bias};
  }
  const WeightGradient of_gate_up{gate_up, recipe, offsets};
  const WeightGradient of_down{down, recipe, offsets};
  if (recipe.fp8_wgrad) {
    const grouped::Tiles tiles = grouped::make_tiles(offsets, rows);
    if (needed(needs::kGateUp)) {
      const grouped::Operand grad =
          grouped::quantize_columns(d_gate_up_out, tiles, recipe.power_of_two);
      drop_gate_up_out();
      d_gate_up = of_gate_up.fp8(
          grad, grouped::quantize_columns(x, tiles, recipe.power_of_two, source, top_k), tiles);
    }
    if (needed(needs::kDown)) {
      const grouped::Operand input =
          grouped::quantize_columns(weighted_h, tiles, recipe.power_of_two);
      weighted_h = at::Tensor();
      d_down = of_down.fp8(grouped::quantize_columns(dy, tiles, recipe.power_of_two, source, top_k),
                           input, tiles);
    }
  } else {
    if (needed(needs::kGateUp)) {
      d_gate_up = of_gate_up.high_precision(d_gate_up_out, grouped::copy_rows(x, place, top_k));
      drop_gate_up_out();
    }
    if (needed(needs::kDown)) {
      d_down = of_down.high_precision(grouped::copy_rows(dy, place, top_k), weighted_h);
    }
  }
  return {dx, d_weights, d_gate_up, d_down, d_gate_up_bias, d_down_bias};
}

at::Tensor moe_experts(const at::Tensor& x, const at::Tensor& top_k_index,
                       const at::Tensor& top_k_weights, const at::Tensor& gate_up,
                       const at::Tensor& down, const std::optional<at::Tensor>& gate_up_bias,
                       const std::optional<at::Tensor>& down_bias, std::string_view activation,
                       bool interleaved, double alpha, double limit, std::string_view recipe) {
  return std::get<0>(_moe_forward(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias,
                                  down_bias, activation_index(activation), interleaved, alpha,
                                  limit, grouped_recipe_id("moe_experts", recipe)));
}

}  // namespace kernel

}  // namespace fp8
