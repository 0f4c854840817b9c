// The MLP of a transformer, forward and backward, for every device: y = down(h), h = act(gate(x)) *
// up(x), or act(fc1(x)). The products are fused_linear's, quantization for quantization, so each
// has the bits that a composition of fused_linear and eager activations would have, with one
// exception: the gradients of x through gate and up are added inside the second product, which
// rounds once less (matmul's `into`).
//
// forward:  x quantized once; the products of gate and up; h quantized as it is computed
// (unit.cpp),
//           never stored in high precision; the product with down.
// backward: dy quantized both ways; dh; one pass from gate, up and dh to FP8 gradients of gate and
//           up in both layouts, and h transposed with the forward's scale; the other products.
//
// Saved: x transposed in FP8, and the products of gate and up, or FP8 codes of them, which only the
// backward reads; nothing of h. To recompute: x alone.
#include "torch/mlp/mlp.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/tensors.h"
#include "torch/linear/steps.h"
#include "torch/matmul/batch_invariant.h"
#include "torch/mlp/saves.h"
#include "torch/mlp/unit.h"
#include "torch/quantize/memory.h"

namespace fp8 {
namespace {

using linear::BackwardArgs;
using linear::OptionalTensor;
using linear::Role;
using mlp_node::Form;
using mlp_node::is_tensorwise;
using mlp_node::Products;
using mlp_node::Saves;
using mlp_node::Unit;

Unit unit_of(Form form, int64_t activation, bool gate_second, double alpha, double limit) {
  return {form, static_cast<mlp_node::Activation>(activation), gate_second, alpha, limit};
}

at::Tensor product(const Side& qx, int64_t rows, const at::Tensor& weight, const Side& qw,
                   const OptionalTensor& bias, const Recipe& recipe, bool invariant) {
  if (rows == 0 || weight.numel() == 0) {
    at::Tensor y = at::zeros({rows, weight.size(0)}, weight.options());
    return bias ? y.add_(*bias) : y;
  }
  return linear::forward_product(qx, qw, bias, weight.scalar_type(), recipe, invariant);
}

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> result = sizes.vec();
  result.back() = last;
  return result;
}

// The scale that an operand had before: of a tensor, from the amax that made it.
Scaling scaling_again(const OptionalTensor& amax, const Recipe& recipe, bool delayed) {
  if (!is_tensorwise(recipe)) return Scaling::dynamic();
  FP8_CHECK_VALUE(amax.has_value(), "fp8::_mlp_backward: expected an amax with the recipe '",
                  recipe.name, "', got None");
  return Scaling::known_amax(*amax, delayed);
}

struct Stored {
  const at::Tensor& codes;
  const OptionalTensor& scales;
};

Products stored_products(const Unit& unit, const Stored& gate_out, const Stored& up_out,
                         int64_t features, int64_t rows, at::ScalarType dtype) {
  FP8_CHECK_VALUE(gate_out.codes.defined() && gate_out.scales,
                  "fp8::_mlp_backward: expected codes and scales of gate_out, got None");
  const auto side = [&](const Stored& stored) {
    return Side{stored.codes, stored.scales.value_or(at::Tensor()), core::Granularity::kRowwise,
                rows};
  };
  return mlp_node::products_of(unit, side(gate_out), side(up_out), features, dtype);
}

struct Layer {
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& amax;
  const OptionalTensor& history;
};

// The products of gate and up again, from x.
struct Recomputed {
  Operand x;
  at::Tensor gate_out;
  at::Tensor up_out;

  Recomputed(const at::Tensor& given, const OptionalTensor& x_amax, const Layer& gate,
             const Layer& up, const Recipe& recipe, bool transposed)
      : x(operand::make(as_matrix(given),
                        {.dtype = recipe.forward_dtype,
                         .granularity = recipe.granularity,
                         .along_rows = transposed,
                         .power_of_two = recipe.power_of_two,
                         .scaling = scaling_again(x_amax, recipe, gate.history.has_value())})) {
    const int64_t rows = as_matrix(given).size(0);
    const bool invariant = batch_invariant::enabled();
    const auto make = [&](const Layer& layer) {
      const Operand qw = operand::remembered_weight(
          *layer.weight, {.dtype = recipe.forward_dtype,
                          .granularity = recipe.weight_granularity,
                          .power_of_two = recipe.power_of_two,
                          .scaling = scaling_again(layer.amax, recipe, layer.history.has_value())});
      return product(x.along_cols, rows, *layer.weight, qw.along_cols, layer.bias, recipe,
                     invariant);
    };
    gate_out = make(gate);
    if (up.weight) up_out = make(up);
  }
};

}  // namespace

namespace kernel {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_mlp_forward(const at::Tensor& x, const at::Tensor& gate, const OptionalTensor& up,
             const at::Tensor& down, const OptionalTensor& gate_bias, const OptionalTensor& up_bias,
             const OptionalTensor& down_bias, int64_t activation, bool gate_second, double alpha,
             double limit, int64_t recipe_id, int64_t needs, const OptionalTensor& gate_history,
             const OptionalTensor& up_history, const OptionalTensor& down_history) {
  check_mlp(x, gate, up, down, gate_bias, up_bias, down_bias, activation, recipe_id, gate_history,
            up_history, down_history);
  const Recipe recipe = recipe_at(recipe_id);
  const bool invariant = batch_invariant::checked("mlp", recipe, /*static_input=*/false);
  const Unit unit =
      unit_of(mlp_node::form_of(gate, up, down), activation, gate_second, alpha, limit);
  const Saves saves(needs);
  const bool tensorwise = is_tensorwise(recipe);
  const bool x_t = saves.x && recipe.fp8_wgrad;
  const c10::DeviceGuard guard(x.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));

  Operand qx =
      operand::remembered_input(x, {.dtype = recipe.forward_dtype,
                                    .granularity = recipe.granularity,
                                    .along_rows = x_t,
                                    .power_of_two = recipe.power_of_two,
                                    .scaling = linear::scaling_of(gate_history, Role::kInput),
                                    .keep_amax = saves.recompute && tensorwise});
  bool overlaps = qx.launched;
  const auto layer = [&](const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& history, at::Tensor& amax) {
    const bool keep_amax = saves.weights && tensorwise;
    const Operand qw = linear::quantize_weight(weight, recipe, history, keep_amax, overlaps);
    overlaps = false;
    if (keep_amax) amax = qw.amax;
    return product(qx.along_cols, rows, weight, qw.along_cols, bias, recipe, invariant);
  };
  at::Tensor gate_amax;
  at::Tensor up_amax;
  at::Tensor gate_out = layer(gate, gate_bias, gate_history, gate_amax);
  at::Tensor up_out = up ? layer(*up, up_bias, up_history, up_amax) : at::Tensor();
  qx.along_cols = {};

  const Side stored_gate = saves.fp8 ? mlp_node::store(gate_out) : Side{};
  const Side stored_up = saves.fp8 ? mlp_node::store(up_out) : Side{};
  const bool keep_h_amax = tensorwise && (needs & mlp_needs::kDown) != 0;
  const bool keep_down_amax = tensorwise && saves.to_h;
  const Operand qh =
      mlp_node::quantize_h(unit, mlp_node::products_of(unit, gate_out, up_out),
                           {.dtype = recipe.forward_dtype,
                            .granularity = recipe.granularity,
                            .power_of_two = recipe.power_of_two,
                            .scaling = linear::scaling_of(down_history, Role::kInput),
                            .keep_amax = keep_h_amax});
  if (saves.fp8) {  // of no use any more
    gate_out.reset();
    up_out.reset();
  }
  const Operand qw =
      linear::quantize_weight(down, recipe, down_history, keep_down_amax, qh.launched);
  const at::Tensor y =
      product(qh.along_cols, rows, down, qw.along_cols, down_bias, recipe, invariant);
  const auto kept = [&](bool keep, const at::Tensor& t) {
    return keep && t.defined() ? t : none_like(x);
  };
  return {x.dim() == 2 ? y : y.view(with_last(x.sizes(), down.size(0))),
          kept(saves.products, saves.fp8 ? stored_gate.codes : gate_out),
          kept(saves.products, saves.fp8 ? stored_up.codes : up_out),
          kept(saves.fp8, stored_gate.scales),
          kept(saves.fp8, stored_up.scales),
          kept(x_t, qx.along_rows.codes),
          kept(x_t, qx.along_rows.scales),
          kept(saves.recompute, qx.amax),
          kept(true, gate_amax),
          kept(true, up_amax),
          kept(keep_down_amax, qw.amax),
          kept(keep_h_amax, qh.amax)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
_mlp_backward(const at::Tensor& given_dy, const OptionalTensor& given_x,
              const OptionalTensor& given_x_scale, const OptionalTensor& saved_gate_out,
              const OptionalTensor& saved_up_out, const OptionalTensor& gate_out_scale,
              const OptionalTensor& up_out_scale, const OptionalTensor& gate,
              const OptionalTensor& up, const OptionalTensor& down, const OptionalTensor& gate_bias,
              const OptionalTensor& up_bias, const OptionalTensor& x_amax,
              const OptionalTensor& gate_amax, const OptionalTensor& up_amax,
              const OptionalTensor& down_amax, const OptionalTensor& h_amax,
              c10::SymInt sym_in_features, c10::SymInt sym_features, int64_t form,
              int64_t activation, bool gate_second, double alpha, double limit, int64_t recipe_id,
              int64_t needs, const OptionalTensor& gate_history, const OptionalTensor& up_history,
              const OptionalTensor& down_history) {
  const Recipe recipe = recipe_at(recipe_id);
  const Unit unit = unit_of(static_cast<Form>(form), activation, gate_second, alpha, limit);
  const int64_t in_features = sym_in_features.expect_int();
  const int64_t features = sym_features.expect_int();
  const Saves saves(needs);
  const c10::DeviceGuard guard(given_dy.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  memory::drop_inputs();
  const at::Tensor dy = as_matrix(given_dy);
  const auto need = [&](int64_t bits) { return (needs & bits) != 0; };
  const bool separate = unit.form == Form::kSeparate;

  OptionalTensor x = given_x;
  OptionalTensor x_scale = given_x_scale;
  at::Tensor gate_out = saved_gate_out.value_or(at::Tensor());
  at::Tensor up_out = saved_up_out.value_or(at::Tensor());
  if (saves.recompute) {
    FP8_CHECK_VALUE(x && gate, "fp8::_mlp_backward: expected x and gate to recompute, got None");
    const bool transposed = need(mlp_needs::kGate | mlp_needs::kUp) && recipe.fp8_wgrad;
    Recomputed again(*x, x_amax, {gate, gate_bias, gate_amax, gate_history},
                     {up, up_bias, up_amax, up_history}, recipe, transposed);
    gate_out = again.gate_out;
    up_out = again.up_out;
    if (transposed) {
      x = again.x.along_rows.codes;
      x_scale = again.x.along_rows.scales;
    }
  }

  Products products;
  if (saves.fp8) {
    products = stored_products(unit, {gate_out, gate_out_scale}, {up_out, up_out_scale}, features,
                               dy.size(0), dy.scalar_type());
    // Of the products' shapes, which is all that the products with their gradients look at.
    const auto shape = [&](int64_t cols) {
      return at::empty_strided({dy.size(0), cols}, {0, 0}, dy.options());
    };
    gate_out = shape(unit.form == Form::kMerged ? 2 * features : features);
    up_out = shape(features);
  } else if (saves.to_h || need(mlp_needs::kDown)) {
    products = mlp_node::products_of(unit, gate_out, up_out);
  }

  // --- down: dh, before its weight gradient, which takes h as the next pass leaves it ---
  const OptionalTensor none;
  BackwardArgs of_down{.dy = dy,
                       .x = none,
                       .x_t_scale = none,
                       .weight = down,
                       .weight_amax = down_amax,
                       .k = features,
                       .recipe = recipe,
                       .needs_dx = saves.to_h,
                       .needs_dweight = need(mlp_needs::kDown),
                       .needs_dbias = need(mlp_needs::kDownBias),
                       .history = down_history};
  const bool quantizes_dy =
      dy.numel() > 0 && (of_down.needs_dx || (of_down.needs_dweight && recipe.fp8_wgrad));
  Operand qdy;
  if (quantizes_dy) qdy = operand::make(dy, linear::request_of_dy(of_down));
  of_down.quantized_dy = &qdy;
  of_down.needs_dweight = false;
  linear::Gradients through_down = linear::backward(of_down);
  qdy.along_cols = {};

  // --- the unit ---
  const mlp_node::Wanted wanted{
      .gate = need(mlp_needs::kX | mlp_needs::kGate | mlp_needs::kGateBias),
      .up = separate ? need(mlp_needs::kX | mlp_needs::kUp | mlp_needs::kUpBias)
                     : unit.form == Form::kMerged && saves.to_h,
      .h = need(mlp_needs::kDown),
      .values = need(mlp_needs::kGateBias | mlp_needs::kUpBias) || !recipe.fp8_wgrad};
  BackwardArgs of_gate{.dy = gate_out,
                       .x = x,
                       .x_t_scale = x_scale,
                       .weight = gate,
                       .weight_amax = gate_amax,
                       .k = in_features,
                       .recipe = recipe,
                       .needs_dx = need(mlp_needs::kX),
                       .needs_dweight = need(mlp_needs::kGate),
                       .needs_dbias = need(mlp_needs::kGateBias),
                       .history = gate_history};
  BackwardArgs of_up{.dy = up_out,
                     .x = x,
                     .x_t_scale = x_scale,
                     .weight = up,
                     .weight_amax = up_amax,
                     .k = in_features,
                     .recipe = recipe,
                     .needs_dx = of_gate.needs_dx,
                     .needs_dweight = need(mlp_needs::kUp),
                     .needs_dbias = need(mlp_needs::kUpBias),
                     .history = up_history};
  mlp_node::UnitGradients made;
  if (wanted.gate || wanted.up || wanted.h) {
    const QuantizeRequest request_of_h{
        .dtype = recipe.forward_dtype,
        .granularity = recipe.granularity,
        .along_cols = false,
        .along_rows = recipe.fp8_wgrad,
        .power_of_two = recipe.power_of_two,
        .scaling = wanted.h ? scaling_again(h_amax, recipe, down_history.has_value())
                            : Scaling::dynamic()};
    made =
        mlp_node::backward_unit(unit, products, through_down.dx, wanted,
                                {.gate = linear::request_of_dy(of_gate),
                                 .up = separate ? linear::request_of_dy(of_up) : QuantizeRequest{},
                                 .h = request_of_h});
  }

  through_down.dx.reset();

  // --- the other products ---
  linear::Gradients d_down;
  if (wanted.h) {
    const OptionalTensor h = recipe.fp8_wgrad ? made.q_h.along_rows.codes : made.h;
    const OptionalTensor h_scale =
        recipe.fp8_wgrad ? OptionalTensor(made.q_h.along_rows.scales) : std::nullopt;
    d_down = linear::backward({.dy = dy,
                               .x = h,
                               .x_t_scale = h_scale,
                               .weight = down,
                               .weight_amax = down_amax,
                               .k = features,
                               .recipe = recipe,
                               .needs_dx = false,
                               .needs_dweight = true,
                               .needs_dbias = false,
                               .history = down_history,
                               .quantized_dy = &qdy});
  }
  const auto through = [&](const BackwardArgs& like, const at::Tensor& d, const Operand& q,
                           const at::Tensor& dx_into) {
    return linear::backward({.dy = d.defined() ? d : like.dy,
                             .x = like.x,
                             .x_t_scale = like.x_t_scale,
                             .weight = like.weight,
                             .weight_amax = like.weight_amax,
                             .k = like.k,
                             .recipe = recipe,
                             .needs_dx = like.needs_dx,
                             .needs_dweight = like.needs_dweight,
                             .needs_dbias = like.needs_dbias,
                             .history = like.history,
                             .quantized_dy = &q,
                             .dx_into = dx_into});
  };
  linear::Gradients d_gate;
  linear::Gradients d_up;
  made.q_h = {};
  if (wanted.gate) d_gate = through(of_gate, made.gate, made.q_gate, {});
  made.q_gate = {};
  if (wanted.up && separate) d_up = through(of_up, made.up, made.q_up, d_gate.dx);
  at::Tensor dx = d_gate.dx;
  if (dx.defined() && given_dy.dim() != 2) dx = dx.view(with_last(given_dy.sizes(), in_features));
  return {or_none(dx, dy),
          or_none(d_gate.dweight, dy),
          or_none(d_up.dweight, dy),
          or_none(d_down.dweight, dy),
          or_none(d_gate.dbias, dy),
          or_none(d_up.dbias, dy),
          or_none(through_down.dbias, dy)};
}

}  // namespace kernel

namespace composite {

at::Tensor mlp(const at::Tensor& x, const at::Tensor& gate, const OptionalTensor& up,
               const at::Tensor& down, std::string_view activation, std::string_view recipe,
               const OptionalTensor& gate_bias, const OptionalTensor& up_bias,
               const OptionalTensor& down_bias, std::string_view save, bool gate_second,
               double alpha, double limit, const OptionalTensor& gate_history,
               const OptionalTensor& up_history, const OptionalTensor& down_history) {
  mlp_node::save_bit(save);
  const auto forward = x.is_meta() ? meta::_mlp_forward : kernel::_mlp_forward;
  return std::get<0>(forward(x, gate, up, down, gate_bias, up_bias, down_bias,
                             mlp_node::activation_index(activation), gate_second, alpha, limit,
                             recipe_id(recipe), /*needs=*/0, gate_history, up_history,
                             down_history));
}

}  // namespace composite

}  // namespace fp8
