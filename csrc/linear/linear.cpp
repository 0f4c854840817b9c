// fused_linear composed of quantize and matmul, forward and backward, for every device.
//
//   fprop  y  = x W^T + b    quantize x [M, K] and W [N, K]              fast accumulation
//   dgrad  dx = dy W         quantize dy [M, N] and W^T [K, N]           as the recipe says: split
//   wgrad  dW = dy^T x       quantize dy^T [N, M] and x^T [K, M]         as the recipe says: split
//
// Hopper's FP8 matmul wants both operands contiguous along the contracted dimension, hence the
// transposed copies. x^T is made and saved in the forward, in place of x; W^T is made in the
// backward, so that no second copy of the weight lives between the passes; dy and dy^T come from
// one quantization, which sums dbias on its way. With block scales all accumulation is split.
#include "linear/linear.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "common/launch.h"
#include "common/recipe.h"
#include "common/tensors.h"
#include "linear/delayed.h"
#include "linear/memory.h"
#include "matmul/matmul.h"
#include "quantize/quantize.h"

namespace fp8 {
namespace {

using core::Granularity;

// Of delayed scaling; null where scales are dynamic.
std::shared_ptr<AmaxHistory> history_of(const at::Tensor& weight, delayed::Operand operand,
                                        const Recipe& recipe) {
  return recipe.delayed ? delayed::history(weight, operand) : nullptr;
}

at::Tensor none_like(const at::Tensor& x) {
  return x.is_meta() ? at::empty({0}, x.options()) : empty_on(x, {0}, x.scalar_type());
}

at::Tensor or_none(const at::Tensor& t, const at::Tensor& like) {
  return t.defined() ? t : none_like(like);
}

template <typename Sizes>
auto with_last(const Sizes& sizes, const typename Sizes::value_type& last) {
  std::vector<typename Sizes::value_type> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

at::Tensor forward_product(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const QuantizedMatrix& qx,
                           const QuantizedMatrix& qw, const Recipe& recipe) {
  const int64_t features = weight.size(0);
  const std::vector<int64_t> shape = with_last(x.sizes(), features);
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  if (rows == 0 || features == 0 || x.size(-1) == 0) {
    at::Tensor y = at::zeros(shape, x.options());
    return bias ? y.add_(*bias) : y;
  }
  const at::Tensor y = matmul({qx.data, qx.scale, rows}, {qw.data, qw.scale, features},
                              {.granularity = recipe.granularity,
                               .granularity_b = recipe.weight_granularity,
                               .out_dtype = x.scalar_type(),
                               .fast_accum = recipe.fast_fprop,
                               .bias = bias.value_or(at::Tensor())});
  return x.dim() == 2 ? y : y.view(shape);
}

// dW in high precision: main_grad (+)= dy^T x, added in fp32 and rounded once. What is added to a
// 16-bit main_grad is made in fp32: at::addmm into 16 bits rounds on the way (seen on an H200).
void wgrad_into(const at::Tensor& main_grad,  // [N, K] any strides
                const at::Tensor& dy,         // [M, N] high precision
                const at::Tensor& x,          // [M, K] in dy's dtype
                bool overwrite) {
  const bool wide = dy.scalar_type() == at::kFloat;
  const bool gpu = dy.is_cuda();
  at::Tensor out = main_grad;
  const int beta = overwrite ? 0 : 1;
  if (overwrite && main_grad.scalar_type() == dy.scalar_type()) {
    at::mm_out(out, dy.t(), x);  // the plain gradient, to the bit
    return;
  }
  if (main_grad.scalar_type() == at::kFloat && wide) {
    at::addmm_out(out, out, dy.t(), x, beta);
    return;
  }
  // cuBLAS refuses some outputs of other strides (seen with one of [1, 2] on an H200).
  if (main_grad.scalar_type() == at::kFloat && gpu && main_grad.is_contiguous()) {
    at::addmm_out(out, out, dy.t(), x, at::kFloat, beta);
    return;
  }
  // A block of rows at a time: 16 MiB of fp32, and not all of dW.
  const int64_t features = main_grad.size(0);
  const int64_t block = std::max<int64_t>(1, (int64_t{1} << 22) / main_grad.size(1));
  for (int64_t start = 0; start < features; start += block) {
    const int64_t count = std::min(block, features - start);
    const at::Tensor left = dy.narrow(1, start, count).t();
    const at::Tensor rows = main_grad.narrow(0, start, count);
    const at::Tensor product = wide  ? at::mm(left, x)
                               : gpu ? at::mm(left, x, at::kFloat)
                                     : at::mm(left.to(at::kFloat), x.to(at::kFloat));
    store_product(rows, product, overwrite);
  }
}

struct BackwardArgs {
  const at::Tensor& dy;                          // [..., N]
  const std::optional<at::Tensor>& x;            // x^T in FP8, or x
  const std::optional<at::Tensor>& x_t_scale;    // fp32: [], or scale_sizes(x_t's sizes)
  const std::optional<at::Tensor>& weight;       // [N, K]
  const std::optional<at::Tensor>& weight_amax;  // [] fp32
  int64_t k;
  Recipe recipe;
  bool needs_dx;
  bool needs_dweight;
  bool needs_dbias;
  at::Tensor main_grad = {};  // [N, K], optional: takes dweight
  bool overwrite = false;     // else main_grad is added to
};

struct Gradients {  // undefined where not asked for; dweight where main_grad took it
  at::Tensor dx;
  at::Tensor dweight;
  at::Tensor dbias;
};

Gradients backward(const BackwardArgs& args) {
  const at::Tensor& dy = args.dy;
  const Recipe& recipe = args.recipe;
  const int64_t k = args.k;
  const at::Tensor& into = args.main_grad;
  const c10::DeviceGuard guard(dy.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::autocast_dispatch_keyset);  // for at::mm
  memory::drop_inputs();
  const at::Tensor matrix = as_matrix(dy);
  const int64_t rows = matrix.size(0);
  const int64_t features = matrix.size(1);
  const bool tensorwise = recipe.granularity == Granularity::kTensorwise;
  const bool empty = rows == 0 || features == 0 || k == 0;

  Gradients grads;
  auto& [dx, dweight, dbias] = grads;
  if (args.needs_dx && empty) dx = at::zeros({rows, k}, dy.options());
  if (args.needs_dweight && empty) {
    if (!into.defined()) dweight = at::zeros({features, k}, dy.options());
    if (into.defined() && args.overwrite) into.zero_();
  }

  QuantizedMatrix qdy;
  const bool dy_data = args.needs_dx && !empty;
  const bool dy_t = args.needs_dweight && !empty && recipe.fp8_wgrad;
  if (dy_data || dy_t) {
    // The bias gradient rides along; a rowwise quantization takes two passes for it, of no more
    // bytes than its one pass and a sum.
    const bool sums = args.needs_dbias && rows <= core::kMaxRowsPerAxisPass;
    qdy = quantize_matrix(
        matrix,
        {.dtype = recipe.grad_dtype,
         .granularity = recipe.granularity,
         .data = dy_data,
         .data_t = dy_t,
         .power_of_two = recipe.power_of_two,
         .history = args.weight ? history_of(*args.weight, delayed::Operand::kGradOutput, recipe)
                                : nullptr,
         .column_sum = sums ? std::optional(dy.scalar_type()) : std::nullopt});
    dbias = qdy.column_sum;
  }
  if (args.needs_dbias && !dbias.defined()) dbias = at::sum(matrix, 0);

  MatmulOptions options{.granularity = recipe.granularity,
                        .out_dtype = dy.scalar_type(),
                        .fast_accum = recipe.fast_wgrad};
  if (dy_data) {
    QuantizeRequest request{.dtype = recipe.forward_dtype,
                            .granularity = recipe.weight_granularity,
                            .data = false,
                            .data_t = true,
                            .power_of_two = recipe.power_of_two,
                            .delayed = recipe.delayed,
                            .overlaps_previous = qdy.launched && is_matrix(*args.weight)};
    if (tensorwise) {
      FP8_CHECK_VALUE(args.weight_amax.has_value(),
                      "fp8::_linear_backward: expected weight_amax, [] float32, with the recipe '",
                      recipe.name, "', got None");
      request.amax = *args.weight_amax;
    }
    const QuantizedMatrix qw = memory::quantize_weight(*args.weight, request);
    const at::Tensor& scale_t = tensorwise ? qw.scale : qw.scale_t;
    MatmulOptions dgrad = options;
    dgrad.granularity_b = recipe.weight_granularity;
    dgrad.fast_accum = recipe.fast_dgrad;
    dx = matmul({qdy.data, qdy.scale, rows}, {qw.data_t, scale_t, k}, dgrad);
  }
  if (args.needs_dweight && !empty) {
    if (recipe.fp8_wgrad) {
      const at::Tensor& scale_t = tensorwise ? qdy.scale : qdy.scale_t;
      if (into.defined()) {
        options.out_dtype = into.scalar_type();
        options.accumulate = into;
        options.overwrite = args.overwrite;
      }
      const at::Tensor dw =
          matmul({qdy.data_t, scale_t, features}, {*args.x, *args.x_t_scale, k}, options);
      if (!into.defined()) dweight = dw;
    } else if (into.defined()) {
      wgrad_into(into, matrix, as_matrix(*args.x), args.overwrite);
    } else {
      dweight = at::mm(matrix.t(), as_matrix(*args.x));
    }
  }
  if (dx.defined() && dy.dim() != 2) dx = dx.view(with_last(dy.sizes(), k));
  return grads;
}

}  // namespace

namespace kernel {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    int64_t recipe_id, bool save_x_t, bool save_weight_amax,
    const std::optional<at::Tensor>& input_scale) {
  check_linear(x, weight, bias);
  const Recipe& recipe = recipe_at(recipe_id);
  if (input_scale) check_input_scale(*input_scale, recipe, x);
  const bool tensorwise = recipe.granularity == Granularity::kTensorwise;
  const c10::DeviceGuard guard(x.device());
  const bool x_t = save_x_t && recipe.fp8_wgrad;
  QuantizeRequest request{.dtype = recipe.forward_dtype,
                          .granularity = recipe.granularity,
                          .data_t = x_t,
                          .power_of_two = recipe.power_of_two,
                          .delayed = recipe.delayed};
  if (input_scale) {
    request.static_scale = input_scale->dim() == 0 ? *input_scale : input_scale->reshape({});
  } else {
    request.history = history_of(weight, delayed::Operand::kInput, recipe);
  }
  const bool recomputes = recipe.delayed && delayed::in_backward();
  request.recomputes = recomputes;
  const QuantizedMatrix qx = memory::quantize_input(x, request);
  const QuantizedMatrix qw = memory::quantize_weight(
      weight, {.dtype = recipe.forward_dtype,
               .granularity = recipe.weight_granularity,
               .power_of_two = recipe.power_of_two,
               .delayed = recipe.delayed,
               .history = history_of(weight, delayed::Operand::kWeight, recipe),
               .recomputes = recomputes,
               .keep_amax = save_weight_amax && tensorwise,
               .overlaps_previous = qx.launched && is_matrix(weight)});
  at::Tensor y = forward_product(x, weight, bias, qx, qw, recipe);
  const at::Tensor& x_t_scale = tensorwise ? qx.scale : qx.scale_t;
  return {y, x_t ? qx.data_t : none_like(x), x_t ? x_t_scale : none_like(x),
          save_weight_amax && tensorwise ? qw.amax : none_like(x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _linear_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& weight_amax, c10::SymInt in_features, int64_t recipe,
    bool needs_dx, bool needs_dweight, bool needs_dbias) {
  const auto [dx, dweight, dbias] = backward({.dy = dy,
                                              .x = x,
                                              .x_t_scale = x_t_scale,
                                              .weight = weight,
                                              .weight_amax = weight_amax,
                                              .k = in_features.expect_int(),
                                              .recipe = recipe_at(recipe),
                                              .needs_dx = needs_dx,
                                              .needs_dweight = needs_dweight,
                                              .needs_dbias = needs_dbias});
  return {or_none(dx, dy), or_none(dweight, dy), or_none(dbias, dy)};
}

std::tuple<at::Tensor, at::Tensor> _linear_backward_into(
    at::Tensor& main_grad, const at::Tensor& dy, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& weight_amax, c10::SymInt in_features, int64_t recipe,
    bool needs_dx, bool needs_dbias, bool overwrite) {
  check_main_grad(main_grad, dy.sym_size(-1), in_features, dy);
  const auto [dx, dweight, dbias] = backward({.dy = dy,
                                              .x = x,
                                              .x_t_scale = x_t_scale,
                                              .weight = weight,
                                              .weight_amax = weight_amax,
                                              .k = in_features.expect_int(),
                                              .recipe = recipe_at(recipe),
                                              .needs_dx = needs_dx,
                                              .needs_dweight = true,
                                              .needs_dbias = needs_dbias,
                                              .main_grad = main_grad,
                                              .overwrite = overwrite});
  return {or_none(dx, dy), or_none(dbias, dy)};
}

at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, std::string_view recipe,
                        const std::optional<at::Tensor>& input_scale) {
  return std::get<0>(
      _linear_forward(x, weight, bias, recipe_id(recipe), false, false, input_scale));
}

at::Tensor _fused_linear_into(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, std::string_view recipe,
                              const at::Tensor& /*main_grad*/, bool /*overwrite*/,
                              const std::optional<at::Tensor>& /*stand_in*/,
                              const std::optional<at::Tensor>& input_scale) {
  return fused_linear(x, weight, bias, recipe, input_scale);
}

}  // namespace kernel

namespace meta {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    int64_t recipe_id, bool save_x_t, bool save_weight_amax,
    const std::optional<at::Tensor>& input_scale) {
  check_linear(x, weight, bias);
  const Recipe& recipe = recipe_at(recipe_id);
  if (input_scale) check_input_scale(*input_scale, recipe, x);
  const bool tensorwise = recipe.granularity == Granularity::kTensorwise;
  const auto fp32 = x.options().dtype(at::kFloat);
  at::Tensor y = at::empty_symint(with_last(x.sym_sizes(), weight.sym_size(0)), x.options());
  if (!save_x_t || !recipe.fp8_wgrad) {
    return {y, none_like(x), none_like(x),
            save_weight_amax && tensorwise ? at::empty({}, fp32) : none_like(x)};
  }
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  const c10::SymInt k = pad16(x.sym_size(-1));
  const c10::SymInt m = pad16(rows);
  return {y, at::empty_symint({k, m}, x.options().dtype(recipe.forward_dtype)),
          tensorwise ? at::empty({}, fp32)
                     : at::empty_symint(scale_sizes(recipe.granularity, k, m), fp32),
          save_weight_amax && tensorwise ? at::empty({}, fp32) : none_like(x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _linear_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& /*x*/,
    const std::optional<at::Tensor>& /*x_t_scale*/, const std::optional<at::Tensor>& /*weight*/,
    const std::optional<at::Tensor>& /*weight_amax*/, c10::SymInt in_features, int64_t /*recipe*/,
    bool needs_dx, bool needs_dweight, bool needs_dbias) {
  const c10::SymInt features = dy.sym_size(-1);
  return {needs_dx ? at::empty_symint(with_last(dy.sym_sizes(), in_features), dy.options())
                   : none_like(dy),
          needs_dweight ? at::empty_symint({features, in_features}, dy.options()) : none_like(dy),
          needs_dbias ? at::empty_symint({features}, dy.options()) : none_like(dy)};
}

at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, std::string_view recipe,
                        const std::optional<at::Tensor>& input_scale) {
  return std::get<0>(
      _linear_forward(x, weight, bias, recipe_id(recipe), false, false, input_scale));
}

at::Tensor _fused_linear_into(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, std::string_view recipe,
                              const at::Tensor& /*main_grad*/, bool /*overwrite*/,
                              const std::optional<at::Tensor>& /*stand_in*/,
                              const std::optional<at::Tensor>& input_scale) {
  return fused_linear(x, weight, bias, recipe, input_scale);
}

std::tuple<at::Tensor, at::Tensor> _linear_backward_into(
    at::Tensor& main_grad, const at::Tensor& dy, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& weight_amax, c10::SymInt in_features, int64_t recipe,
    bool needs_dx, bool needs_dbias, bool /*overwrite*/) {
  check_main_grad(main_grad, dy.sym_size(-1), in_features, dy);
  const auto [dx, dweight, dbias] =
      _linear_backward(dy, x, x_t_scale, weight, weight_amax, in_features, recipe, needs_dx,
                       /*needs_dweight=*/false, needs_dbias);
  return {dx, dbias};
}

}  // namespace meta

}  // namespace fp8
