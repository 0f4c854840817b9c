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
#include "torch/linear/linear.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "host/launch.h"
#include "torch/common/main_grad.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/linear/steps.h"
#include "torch/matmul/batch_invariant.h"
#include "torch/matmul/matmul.h"
#include "torch/quantize/memory.h"

namespace fp8 {

using core::Granularity;
using linear::BackwardArgs;
using linear::Gradients;
using linear::Role;

Scaling linear::scaling_of(const OptionalTensor& history, Role role) {
  if (!history) return Scaling::dynamic();
  return Scaling::of_history(*history, static_cast<int64_t>(role));
}

Operand linear::quantize_weight(const at::Tensor& weight, const Recipe& recipe,
                                const OptionalTensor& history, bool keep_amax, bool pdl) {
  return operand::remembered_weight(weight, {.dtype = recipe.forward_dtype,
                                             .granularity = recipe.weight_granularity,
                                             .power_of_two = recipe.power_of_two,
                                             .scaling = scaling_of(history, Role::kWeight),
                                             .keep_amax = keep_amax,
                                             .pdl = pdl && is_matrix(weight)});
}

at::Tensor linear::forward_product(const Side& x, const Side& weight, const OptionalTensor& bias,
                                   at::ScalarType dtype, const Recipe& recipe, bool invariant) {
  return matmul(x, weight,
                {.dtype = dtype,
                 .fast_accum = recipe.fast_fprop,
                 .bias = bias.value_or(at::Tensor()),
                 .batch_invariant = invariant});
}

namespace {

Scaling given_scaling(const at::Tensor& scale) {  // one element
  return Scaling::given(scale.dim() == 0 ? scale : scale.reshape({}));
}

template <typename Sizes>
auto with_last(const Sizes& sizes, const typename Sizes::value_type& last) {
  std::vector<typename Sizes::value_type> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

at::Tensor forward_product(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const Side& qx, const Side& qw,
                           const Recipe& recipe, bool invariant) {
  const int64_t features = weight.size(0);
  const std::vector<int64_t> shape = with_last(x.sizes(), features);
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  if (rows == 0 || features == 0 || x.size(-1) == 0) {
    at::Tensor y = at::zeros(shape, x.options());
    return bias ? y.add_(*bias) : y;
  }
  const at::Tensor y = linear::forward_product(qx, qw, bias, x.scalar_type(), recipe, invariant);
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
  // cuBLAS refuses some outputs of other strides (seen on an H200: [1, 2] of strides (1, 1), which
  // counts as contiguous).
  const bool dense = main_grad.stride(1) == 1 && main_grad.stride(0) == main_grad.size(1);
  if (main_grad.scalar_type() == at::kFloat && gpu && dense) {
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

const at::Tensor& required(const char* name, const std::optional<at::Tensor>& t,
                           const Recipe& recipe) {
  FP8_CHECK_VALUE(t.has_value(), "fp8::_linear_backward: expected ", name, " with the recipe '",
                  recipe.name, "', got None");
  return *t;
}

// Where there is nothing to multiply.
Gradients zero_gradients(const BackwardArgs& args, const at::Tensor& dy) {  // [M, N]
  Gradients grads;
  if (args.needs_dx) grads.dx = at::zeros({dy.size(0), args.k}, dy.options());
  if (args.needs_dweight && args.main_grad.defined()) {
    if (args.overwrite) args.main_grad.zero_();
  } else if (args.needs_dweight) {
    grads.dweight = at::zeros({dy.size(1), args.k}, dy.options());
  }
  return grads;
}

// [M, K]
at::Tensor input_gradient(const BackwardArgs& args, const Operand& dy) {
  const Recipe& recipe = args.recipe;
  const at::Tensor& weight = required("weight, [N, K],", args.weight, recipe);
  const Scaling scaling =
      recipe.granularity == Granularity::kTensorwise
          ? Scaling::known_amax(required("weight_amax, [] float32,", args.weight_amax, recipe),
                                args.history.has_value())
          : Scaling::dynamic();
  const Operand qw = operand::remembered_weight(weight, {.dtype = recipe.forward_dtype,
                                                         .granularity = recipe.weight_granularity,
                                                         .along_cols = false,
                                                         .along_rows = true,
                                                         .power_of_two = recipe.power_of_two,
                                                         .scaling = scaling,
                                                         .pdl = dy.launched && is_matrix(weight)});
  return matmul(
      dy.along_cols, qw.along_rows,
      {.dtype = args.dy.scalar_type(), .fast_accum = recipe.fast_dgrad, .into = args.dx_into});
}

// [N, K], undefined where main_grad takes it.
at::Tensor weight_gradient(const BackwardArgs& args,
                           const at::Tensor& dy,  // [M, N]
                           const Side& dy_t) {    // [N, M], with FP8 wgrad
  const at::Tensor& into = args.main_grad;
  const at::Tensor& x = required("x, or x_t,", args.x, args.recipe);
  if (!args.recipe.fp8_wgrad) {
    if (!into.defined()) return at::mm(dy.t(), as_matrix(x));
    wgrad_into(into, dy, as_matrix(x), args.overwrite);
    return {};
  }
  const Side x_t = operand::given("_linear_backward", "x_t", x,
                                  required("x_t_scale", args.x_t_scale, args.recipe),
                                  args.recipe.granularity, args.k);
  const at::Tensor dweight =
      matmul(dy_t, x_t,
             {.dtype = into.defined() ? into.scalar_type() : dy.scalar_type(),
              .fast_accum = args.recipe.fast_wgrad,
              .into = into,
              .overwrite = args.overwrite});
  return into.defined() ? at::Tensor() : dweight;
}

struct Forward {
  Recipe recipe;
  bool x_t;
  bool weight_amax;
};

// What a forward saves beside y, for arguments that fit.
Forward checked_forward(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, int64_t recipe_id, bool save_x_t,
                        bool save_weight_amax, const std::optional<at::Tensor>& input_scale,
                        const std::optional<at::Tensor>& history) {
  check_linear(x, weight, bias);
  const Recipe recipe = recipe_at(recipe_id);
  if (input_scale) check_input_scale(*input_scale, recipe, x);
  if (history) check_history(*history, recipe, x);
  return {recipe, save_x_t && recipe.fp8_wgrad,
          save_weight_amax && recipe.granularity == Granularity::kTensorwise};
}

}  // namespace

// The bias gradient comes on the way: a rowwise quantization takes two passes for it, of no more
// bytes than its one pass and a sum.
QuantizeRequest linear::request_of_dy(const BackwardArgs& args) {
  const Recipe& recipe = args.recipe;
  const bool sums = args.needs_dbias && args.dy.size(0) <= core::kMaxRowsPerAxisPass;
  return {.dtype = recipe.grad_dtype,
          .granularity = recipe.granularity,
          .along_cols = args.needs_dx,
          .along_rows = args.needs_dweight && recipe.fp8_wgrad,
          .power_of_two = recipe.power_of_two,
          .scaling = scaling_of(args.history, Role::kGradOutput),
          .column_sum = sums ? std::optional(args.dy.scalar_type()) : std::nullopt};
}

Gradients linear::backward(const BackwardArgs& args) {
  const at::Tensor& dy = args.dy;
  const bool empty = dy.size(0) == 0 || dy.size(1) == 0 || args.k == 0;
  Gradients grads;
  if (empty) {
    grads = zero_gradients(args, dy);
  } else {
    Operand qdy;
    if (args.quantized_dy != nullptr) {
      qdy = *args.quantized_dy;
    } else if (args.needs_dx || (args.needs_dweight && args.recipe.fp8_wgrad)) {
      qdy = operand::make(dy, request_of_dy(args));
    }
    grads.dbias = qdy.column_sum;
    if (args.needs_dx) grads.dx = input_gradient(args, qdy);
    if (args.needs_dweight) grads.dweight = weight_gradient(args, dy, qdy.along_rows);
  }
  if (args.needs_dbias && !grads.dbias.defined()) grads.dbias = at::sum(dy, 0);
  return grads;
}

namespace kernel {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    int64_t recipe_id, bool save_x_t, bool save_weight_amax,
    const std::optional<at::Tensor>& input_scale, const std::optional<at::Tensor>& history) {
  const auto [recipe, x_t, keep_amax] =
      checked_forward(x, weight, bias, recipe_id, save_x_t, save_weight_amax, input_scale, history);
  const bool invariant = batch_invariant::checked("fused_linear", recipe, input_scale.has_value());
  const c10::DeviceGuard guard(x.device());
  const Operand qx = operand::remembered_input(
      x, {.dtype = recipe.forward_dtype,
          .granularity = recipe.granularity,
          .along_rows = x_t,
          .power_of_two = recipe.power_of_two,
          .scaling = input_scale ? given_scaling(*input_scale)
                                 : linear::scaling_of(history, Role::kInput)});
  const Operand qw = linear::quantize_weight(weight, recipe, history, keep_amax, qx.launched);
  at::Tensor y = forward_product(x, weight, bias, qx.along_cols, qw.along_cols, recipe, invariant);
  return {y, x_t ? qx.along_rows.codes : none_like(x), x_t ? qx.along_rows.scales : none_like(x),
          keep_amax ? qw.amax : none_like(x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _linear_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& weight_amax, c10::SymInt in_features, int64_t recipe,
    bool needs_dx, bool needs_dweight, bool needs_dbias, const std::optional<at::Tensor>& main_grad,
    bool overwrite, const std::optional<at::Tensor>& history) {
  if (main_grad) {
    check_main_grad("fused_linear", "main_grad", *main_grad, {dy.sym_size(-1), in_features}, dy);
  }
  if (history) check_history(*history, recipe_at(recipe), dy);
  const c10::DeviceGuard guard(dy.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::autocast_dispatch_keyset);  // for at::mm
  memory::drop_inputs();
  const at::Tensor matrix = as_matrix(dy);
  auto [dx, dweight, dbias] = linear::backward({.dy = matrix,
                                                .x = x,
                                                .x_t_scale = x_t_scale,
                                                .weight = weight,
                                                .weight_amax = weight_amax,
                                                .k = in_features.expect_int(),
                                                .recipe = recipe_at(recipe),
                                                .needs_dx = needs_dx,
                                                .needs_dweight = needs_dweight,
                                                .needs_dbias = needs_dbias,
                                                .main_grad = main_grad.value_or(at::Tensor()),
                                                .overwrite = overwrite,
                                                .history = history});
  if (dx.defined() && dy.dim() != 2) dx = dx.view(with_last(dy.sizes(), in_features.expect_int()));
  return {or_none(dx, dy), or_none(dweight, dy), or_none(dbias, dy)};
}

}  // namespace kernel

namespace meta {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    int64_t recipe_id, bool save_x_t, bool save_weight_amax,
    const std::optional<at::Tensor>& input_scale, const std::optional<at::Tensor>& history) {
  const auto [recipe, x_t, keep_amax] =
      checked_forward(x, weight, bias, recipe_id, save_x_t, save_weight_amax, input_scale, history);
  const auto fp32 = x.options().dtype(at::kFloat);
  at::Tensor y = at::empty_symint(with_last(x.sym_sizes(), weight.sym_size(0)), x.options());
  if (!x_t) {
    return {y, none_like(x), none_like(x), keep_amax ? at::empty({}, fp32) : none_like(x)};
  }
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  const c10::SymInt k = pad16(x.sym_size(-1));
  const c10::SymInt m = pad16(rows);
  return {y, at::empty_symint({k, m}, x.options().dtype(recipe.forward_dtype)),
          at::empty_symint(scale_sizes(recipe.granularity, k, m), fp32),
          keep_amax ? at::empty({}, fp32) : none_like(x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _linear_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& /*x*/,
    const std::optional<at::Tensor>& /*x_t_scale*/, const std::optional<at::Tensor>& /*weight*/,
    const std::optional<at::Tensor>& /*weight_amax*/, c10::SymInt in_features, int64_t recipe,
    bool needs_dx, bool needs_dweight, bool needs_dbias, const std::optional<at::Tensor>& main_grad,
    bool /*overwrite*/, const std::optional<at::Tensor>& history) {
  if (history) check_history(*history, recipe_at(recipe), dy);
  const c10::SymInt features = dy.sym_size(-1);
  if (main_grad) {
    check_main_grad("fused_linear", "main_grad", *main_grad, {features, in_features}, dy);
  }
  const bool returns_dweight = needs_dweight && !main_grad;
  return {needs_dx ? at::empty_symint(with_last(dy.sym_sizes(), in_features), dy.options())
                   : none_like(dy),
          returns_dweight ? at::empty_symint({features, in_features}, dy.options()) : none_like(dy),
          needs_dbias ? at::empty_symint({features}, dy.options()) : none_like(dy)};
}

}  // namespace meta

namespace composite {

at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, std::string_view recipe,
                        const std::optional<at::Tensor>& input_scale,
                        const std::optional<at::Tensor>& history) {
  const auto forward = x.is_meta() ? meta::_linear_forward : kernel::_linear_forward;
  return std::get<0>(forward(x, weight, bias, recipe_id(recipe), /*save_x_t=*/false,
                             /*save_weight_amax=*/false, input_scale, history));
}

std::tuple<at::Tensor, at::Tensor> _fused_linear_functional(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::string_view recipe, const std::optional<at::Tensor>& input_scale,
    const std::optional<at::Tensor>& history) {
  std::optional<at::Tensor> next;
  if (history) next = history->clone();
  const at::Tensor y = fused_linear(x, weight, bias, recipe, input_scale, next);
  return {y, next ? *next : none_like(x)};
}

at::Tensor _fused_linear_into(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, std::string_view recipe,
                              const at::Tensor& /*main_grad*/, bool /*overwrite*/,
                              const std::optional<at::Tensor>& /*stand_in*/,
                              const std::optional<at::Tensor>& input_scale,
                              const std::optional<at::Tensor>& history) {
  return fused_linear(x, weight, bias, recipe, input_scale, history);
}

}  // namespace composite

}  // namespace fp8
