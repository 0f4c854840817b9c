// grouped_linear: every group of rows through the weight of its expert, forward and backward.
//
//   fprop  y  = x W^T + b   x rows and W's rows quantized           fast accumulation
//   dgrad  dx = dy W        dy rows and W's columns quantized       as the recipe says
//   wgrad  dW = dy^T x      columns of dy and x, group by group     as the recipe says; or in bf16
//
// Rows keep their places: a group of rows may begin anywhere. Only wgrad contracts over rows, and
// for it the transposed copies pad each group to a multiple of 32 columns. N and K that are no
// multiples of 16 are padded by copies of the operands, which no usual model needs.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/main_grad.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/grouped/grouped_mm.h"
#include "torch/grouped/grouped_ops.h"
#include "torch/grouped/weight_gradient.h"

namespace fp8 {
namespace {

// Zeros behind the last two dimensions' (or the last one's) elements, up to multiples of 16.
at::Tensor padded(const at::Tensor& t, int64_t dims) {
  std::vector<int64_t> pad;
  bool whole = true;
  for (int64_t d = 1; d <= dims; ++d) {
    pad.push_back(0);
    pad.push_back(pad16(t.size(-d)) - t.size(-d));
    whole = whole && pad.back() == 0;
  }
  return whole ? t : at::constant_pad_nd(t, pad);
}

// x as rows that a kernel can read: contiguous columns, in sixteens.
at::Tensor rows_of(const at::Tensor& x) { return padded(as_matrix(x), 1); }

void finish(const at::Tensor& y, const at::Tensor& offsets, const at::Tensor& bias) {
  const core::FinishRowsArgs args{.x = y.mutable_data_ptr(),
                                  .dtype = to_core(y.scalar_type()),
                                  .rows = y.size(0),
                                  .cols = y.size(1),
                                  .ld = leading_dim(y),
                                  .groups = offsets.size(0),
                                  .offsets = offsets.const_data_ptr<int32_t>(),
                                  .bias = bias.defined() ? bias.const_data_ptr() : nullptr};
  FP8_RUN_PASS(finish_rows, y, args);
}

// The first `cols` columns, contiguous.
at::Tensor first_columns(const at::Tensor& y, int64_t cols) {
  return y.size(1) == cols ? y : y.narrow(1, 0, cols).contiguous();
}

at::Tensor group_sums_of(const at::Tensor& dy, const at::Tensor& offsets) {
  const at::Tensor out = empty_on(dy, {offsets.size(0), dy.size(1)}, dy.scalar_type());
  const core::GroupSumsArgs args{.x = dy.const_data_ptr(),
                                 .dtype = to_core(dy.scalar_type()),
                                 .cols = dy.size(1),
                                 .ld = leading_dim(dy),
                                 .groups = offsets.size(0),
                                 .offsets = offsets.const_data_ptr<int32_t>(),
                                 .out = out.mutable_data_ptr()};
  FP8_RUN_PASS(group_sums, dy, args);
  return out;
}

struct BackwardArgs {
  const at::Tensor& dy;                             // [T, N]
  const std::optional<at::Tensor>& x;               // x_t [pad16(K), L] FP8, or x [T, K]
  const std::optional<at::Tensor>& x_t_scale;       // [E, pad16(K)] fp32
  const std::optional<at::Tensor>& padded_offsets;  // [E] int32
  const std::optional<at::Tensor>& weight;          // [E, N, K]
  const std::optional<at::Tensor>& weight_amax;     // [E, pad16(K)] fp32
  const at::Tensor& offsets;                        // [E] int32
  int64_t k;
  bool transposed;  // how dweight is stored
  Recipe recipe;
  at::Tensor main_grad;  // [E, N, K], optional: takes dweight
  bool overwrite;        // else main_grad is added to

  grouped::WeightGradient weight_gradient() const {
    return {.features = dy.size(1),
            .in_features = k,
            .transposed = transposed,
            .dtype = dy.scalar_type(),
            .fast_accum = recipe.fast_wgrad,
            .main_grad = main_grad,
            .overwrite = overwrite};
  }
};

// [T, K]
at::Tensor input_gradient(const BackwardArgs& args, const at::Tensor& dy_rows) {  // [T, pad16(N)]
  const Side qdy = grouped::quantize_rows(dy_rows, args.recipe);
  const Side qw = grouped::weight_for_dgrad(padded(*args.weight, 2), args.recipe, args.weight_amax);
  const at::Tensor dx = first_columns(
      grouped::multiply_rows(qdy, qw, args.offsets, args.dy.scalar_type(), args.recipe.fast_dgrad),
      args.k);
  finish(dx, args.offsets, {});
  return dx;
}

// [E, N, K], undefined where main_grad takes it.
at::Tensor weight_gradient(const BackwardArgs& args, const at::Tensor& dy_rows) {  // [T, pad16(N)]
  const grouped::WeightGradient of_weight = args.weight_gradient();
  const at::Tensor& x = *args.x;
  if (!args.recipe.fp8_wgrad) return of_weight.high_precision(dy_rows, rows_of(x), args.offsets);
  const grouped::Tiles tiles = grouped::make_tiles(args.offsets, dy_rows.size(0));
  const Side qdy_t = grouped::quantize_columns(dy_rows, tiles, args.recipe.power_of_two);
  const Side qx_t = operand::given("_grouped_backward", "x_t", x, *args.x_t_scale,
                                   core::Granularity::kRowwise, x.size(0));
  return of_weight.fp8(qdy_t, qx_t, *args.padded_offsets);
}

}  // namespace

void check_grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets,
                          const std::optional<at::Tensor>& bias) {
  FP8_CHECK_HIGH_PRECISION("grouped_linear", "x", x);
  FP8_CHECK_TYPE(weight.scalar_type() == x.scalar_type(),
                 "fp8::grouped_linear: expected weight in x's dtype ", x.scalar_type(), ", got ",
                 weight.scalar_type());
  FP8_CHECK_TYPE(offsets.scalar_type() == at::kInt,
                 "fp8::grouped_linear: expected offsets in int32, got ", offsets.scalar_type());
  FP8_CHECK_VALUE(x.dim() == 2, "fp8::grouped_linear: expected x [T, K], got shape ",
                  x.sym_sizes());
  FP8_CHECK_VALUE(weight.dim() == 3, "fp8::grouped_linear: expected weight [E, N, K], got shape ",
                  weight.sym_sizes());
  FP8_CHECK_VALUE(x.sym_size(1) == weight.sym_size(2),
                  "fp8::grouped_linear: x and weight must share K, got x=", x.sym_sizes(),
                  ", weight=", weight.sym_sizes(), " (weight is [E, N, K])");
  FP8_CHECK_VALUE(offsets.dim() == 1 && offsets.sym_size(0) == weight.sym_size(0),
                  "fp8::grouped_linear: expected offsets of shape [E] = [", weight.sym_size(0),
                  "], got ", offsets.sym_sizes());
  FP8_CHECK_VALUE(weight.sym_size(0) <= core::kMaxGroups, "fp8::grouped_linear: expected at most ",
                  core::kMaxGroups, " groups, got ", weight.sym_size(0));
  FP8_CHECK_SAME_DEVICE("grouped_linear", "weight", weight, "x", x);
  FP8_CHECK_SAME_DEVICE("grouped_linear", "offsets", offsets, "x", x);
  if (!bias) return;
  FP8_CHECK_TYPE(bias->scalar_type() == x.scalar_type(),
                 "fp8::grouped_linear: expected bias in x's dtype ", x.scalar_type(), ", got ",
                 bias->scalar_type());
  FP8_CHECK_VALUE(bias->dim() == 2 && bias->sym_size(0) == weight.sym_size(0) &&
                      bias->sym_size(1) == weight.sym_size(1),
                  "fp8::grouped_linear: expected bias of shape [E, N] = [", weight.sym_size(0),
                  ", ", weight.sym_size(1), "], got ", bias->sym_sizes());
  FP8_CHECK_SAME_DEVICE("grouped_linear", "bias", *bias, "x", x);
}

namespace kernel {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _grouped_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& given_offsets,
    const std::optional<at::Tensor>& bias, int64_t recipe_id, bool save_x, bool save_amax) {
  check_grouped_linear(x, weight, given_offsets, bias);
  const Recipe recipe = grouped_recipe_at(recipe_id);
  const c10::DeviceGuard guard(x.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor offsets = given_offsets.contiguous();
  const int64_t features = weight.size(1);
  const bool empty = x.numel() == 0 || weight.numel() == 0;

  const bool keep_amax = save_amax && grouped::keeps_amax(weight, recipe);
  at::Tensor y;
  at::Tensor amax = none_like(x);
  const at::Tensor rows = empty ? at::Tensor() : rows_of(x);
  if (empty) {
    y = at::zeros({x.size(0), features}, x.options());
  } else {
    const Side qx = grouped::quantize_rows(rows, recipe);
    const auto [qw, kept] = grouped::weight_for_fprop(padded(weight, 2), recipe, keep_amax);
    if (keep_amax) amax = kept;
    y = first_columns(grouped::multiply_rows(qx, qw, offsets, x.scalar_type(), recipe.fast_fprop),
                      features);
  }
  if (y.numel() > 0 && offsets.size(0) > 0 && (bias || !empty)) {
    finish(y, offsets, bias ? bias->contiguous() : at::Tensor());
  }
  if (empty && keep_amax) {
    amax = at::zeros({weight.size(0), pad16(weight.size(2))}, x.options().dtype(at::kFloat));
  }
  if (!save_x || !recipe.fp8_wgrad) return {y, none_like(x), none_like(x), none_like(x), amax};
  const int64_t groups = offsets.size(0);
  if (empty) {
    const int64_t k = pad16(x.size(1));
    return {y,
            at::zeros({k, core::max_padded_rows(x.size(0), groups)},
                      x.options().dtype(at::kFloat8_e4m3fn)),
            at::ones({groups, k}, x.options().dtype(at::kFloat)),
            at::zeros({groups}, offsets.options()), amax};
  }
  const grouped::Tiles tiles = grouped::make_tiles(offsets, x.size(0));
  const Side qx_t = grouped::quantize_columns(rows, tiles, recipe.power_of_two);
  return {y, qx_t.codes, qx_t.scales, tiles.padded_offsets, amax};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _grouped_backward(
    const at::Tensor& given_dy, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& padded_offsets,
    const std::optional<at::Tensor>& weight, const at::Tensor& given_offsets,
    c10::SymInt in_features, bool transposed, int64_t recipe_id, bool needs_dx, bool needs_dweight,
    bool needs_dbias, const std::optional<at::Tensor>& weight_amax,
    const std::optional<at::Tensor>& main_grad, bool overwrite) {
  if (main_grad) {
    check_main_grad("grouped_linear", "main_grad", *main_grad,
                    {given_offsets.sym_size(0), given_dy.sym_size(1), in_features}, given_dy);
  }
  const c10::DeviceGuard guard(given_dy.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor dy = as_matrix(given_dy);
  const at::Tensor offsets = given_offsets.contiguous();
  const int64_t groups = offsets.size(0);
  const BackwardArgs args{.dy = dy,
                          .x = x,
                          .x_t_scale = x_t_scale,
                          .padded_offsets = padded_offsets,
                          .weight = weight,
                          .weight_amax = weight_amax,
                          .offsets = offsets,
                          .k = in_features.expect_int(),
                          .transposed = transposed,
                          .recipe = grouped_recipe_at(recipe_id),
                          .main_grad = main_grad.value_or(at::Tensor()),
                          .overwrite = overwrite};
  const bool empty = dy.numel() == 0 || args.k == 0 || groups == 0;
  const at::Tensor dy_rows = empty ? dy : rows_of(dy);
  at::Tensor dx;
  at::Tensor dweight;
  at::Tensor dbias;
  if (needs_dbias) {
    dbias = dy.numel() == 0 || groups == 0 ? at::zeros({groups, dy.size(1)}, dy.options())
                                           : group_sums_of(dy, offsets);
  }
  if (needs_dx) {
    dx = empty ? at::zeros({dy.size(0), args.k}, dy.options()) : input_gradient(args, dy_rows);
  }
  if (needs_dweight) {
    dweight = empty ? args.weight_gradient().zeros(dy, groups) : weight_gradient(args, dy_rows);
  }
  return {or_none(dx, dy), or_none(dweight, dy), or_none(dbias, dy)};
}

}  // namespace kernel

namespace meta {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> _grouped_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets,
    const std::optional<at::Tensor>& bias, int64_t recipe_id, bool save_x, bool save_amax) {
  check_grouped_linear(x, weight, offsets, bias);
  at::Tensor y = at::empty_symint({x.sym_size(0), weight.sym_size(1)}, x.options());
  const Recipe recipe = grouped_recipe_at(recipe_id);
  const at::Tensor amax = save_amax ? grouped::kept_amax_like(weight, recipe) : none_like(x);
  if (!save_x || !recipe.fp8_wgrad) {
    return {y, none_like(x), none_like(x), none_like(x), amax};
  }
  const c10::SymInt groups = offsets.sym_size(0);
  const c10::SymInt k = pad16(x.sym_size(1));
  return {y,
          at::empty_symint({k, core::max_padded_rows(x.sym_size(0), groups)},
                           x.options().dtype(at::kFloat8_e4m3fn)),
          at::empty_symint({groups, k}, x.options().dtype(at::kFloat)),
          at::empty_symint({groups}, offsets.options()), amax};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _grouped_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& /*x*/,
    const std::optional<at::Tensor>& /*x_t_scale*/,
    const std::optional<at::Tensor>& /*padded_offsets*/,
    const std::optional<at::Tensor>& /*weight*/, const at::Tensor& offsets, c10::SymInt in_features,
    bool transposed, int64_t /*recipe*/, bool needs_dx, bool needs_dweight, bool needs_dbias,
    const std::optional<at::Tensor>& /*weight_amax*/, const std::optional<at::Tensor>& main_grad,
    bool /*overwrite*/) {
  const c10::SymInt groups = offsets.sym_size(0);
  const c10::SymInt features = dy.sym_size(1);
  if (main_grad) {
    check_main_grad("grouped_linear", "main_grad", *main_grad, {groups, features, in_features}, dy);
  }
  at::Tensor dweight = none_like(dy);
  if (needs_dweight && !main_grad) {
    dweight = transposed
                  ? at::empty_symint({groups, in_features, features}, dy.options()).transpose(1, 2)
                  : at::empty_symint({groups, features, in_features}, dy.options());
  }
  return {needs_dx ? at::empty_symint({dy.sym_size(0), in_features}, dy.options()) : none_like(dy),
          dweight,
          needs_dbias ? at::empty_symint({groups, features}, dy.options()) : none_like(dy)};
}

}  // namespace meta

at::Tensor composite::grouped_linear(const at::Tensor& x, const at::Tensor& weight,
                                     const at::Tensor& offsets,
                                     const std::optional<at::Tensor>& bias,
                                     std::string_view recipe) {
  const auto forward = x.is_meta() ? meta::_grouped_forward : kernel::_grouped_forward;
  return std::get<0>(forward(x, weight, offsets, bias, grouped_recipe_id("grouped_linear", recipe),
                             /*save_x=*/false, /*save_amax=*/false));
}

at::Tensor composite::_grouped_linear_into(const at::Tensor& x, const at::Tensor& weight,
                                           const at::Tensor& offsets,
                                           const std::optional<at::Tensor>& bias,
                                           std::string_view recipe, const at::Tensor& /*main_grad*/,
                                           bool /*overwrite*/,
                                           const std::optional<at::Tensor>& /*stand_in*/) {
  return grouped_linear(x, weight, offsets, bias, recipe);
}

}  // namespace fp8
