// Linear layers that read the same x as one, for every device: the layer of linear.cpp whose weight
// is their weights one below the other, with its bits. Nothing is copied together in high
// precision: the quantization reads the parts.
//
//   fprop  y  = x W^T + b    one product; each layer's result is its columns of y
//   dgrad  dx = dy W         one product, contracted over all rows of W: no sum of several dx
//   wgrad  dW = dy^T x       one product for each run of neighbouring parts that want one
//
// A part without a gradient is no part of the backward. Where the weight gradient is made in high
// precision (rowwise_gw_hp) it is a product for each part.
#include "torch/merged/merged.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "host/formats.h"
#include "host/launch.h"
#include "torch/common/recipe.h"
#include "torch/common/tensors.h"
#include "torch/linear/linear.h"
#include "torch/linear/steps.h"
#include "torch/matmul/batch_invariant.h"
#include "torch/matmul/matmul.h"
#include "torch/merged/shared.h"
#include "torch/quantize/memory.h"

namespace fp8 {
namespace {

using core::Granularity;
using linear::Role;
using merged::is_tensorwise;
using merged::sum_of;
using merged::wants;
using merged::with_last;
using OptionalTensor = std::optional<at::Tensor>;

// The parts that have rows (weights) or columns (dys).
std::vector<at::Tensor> not_empty(at::TensorList parts) {
  std::vector<at::Tensor> found;
  for (const at::Tensor& part : parts) {
    if (part.numel() > 0) found.push_back(part);
  }
  return found;
}

bool all_matrices(at::TensorList tensors) {
  return std::all_of(tensors.begin(), tensors.end(), is_matrix);
}

// Rows of a side: those of neighbouring parts.
Side rows_of(const Side& side, int64_t start, int64_t count) {
  Side rows = side;
  rows.codes = side.codes.narrow(0, start, count);
  rows.rows = count;
  if (side.granularity == Granularity::kRowwise) {
    rows.scales = side.scales.narrow(0, start, count);
    if (!on_16_bytes(rows.scales)) rows.scales = rows.scales.clone();
  }
  return rows;
}

struct Backward {
  std::vector<at::Tensor> dys;  // [M, N_i]
  const OptionalTensor& x;
  const OptionalTensor& x_t_scale;
  at::TensorList weights;
  const OptionalTensor& weight_amax;
  int64_t k;
  Recipe recipe;
  int64_t needs_dweight;
  const OptionalTensor& history;
};

at::Tensor input_gradient(const Backward& b, const Operand& qdy) {
  FP8_CHECK_VALUE(!is_tensorwise(b.recipe) || b.weight_amax.has_value(),
                  "fp8::_merged_backward: expected weight_amax with the recipe '", b.recipe.name,
                  "', got None");
  const Scaling scaling = is_tensorwise(b.recipe)
                              ? Scaling::known_amax(*b.weight_amax, b.history.has_value())
                              : Scaling::dynamic();
  const Operand qw = operand::remembered_weights(not_empty(b.weights),
                                                 {.dtype = b.recipe.forward_dtype,
                                                  .granularity = b.recipe.weight_granularity,
                                                  .along_cols = false,
                                                  .along_rows = true,
                                                  .power_of_two = b.recipe.power_of_two,
                                                  .scaling = scaling,
                                                  .pdl = qdy.launched && all_matrices(b.weights)});
  return matmul(qdy.along_cols, qw.along_rows,
                {.dtype = b.dys.front().scalar_type(), .fast_accum = b.recipe.fast_dgrad});
}

// [rows that want one, K]: a product for each run of parts.
at::Tensor weight_gradients(const Backward& b, const Side& dy_t) {
  const auto rows_wanted = [&] {
    int64_t rows = 0;
    for (size_t i = 0; i < b.dys.size(); ++i) {
      if (wants(b.needs_dweight, i)) rows += b.dys[i].size(1);
    }
    return rows;
  };
  FP8_CHECK_VALUE(b.x.has_value(), "fp8::_merged_backward: expected x, or x_t, with the recipe '",
                  b.recipe.name, "', got None");
  at::Tensor out = empty_on(b.dys.front(), {rows_wanted(), b.k}, b.dys.front().scalar_type());
  int64_t done = 0;
  if (!b.recipe.fp8_wgrad) {
    for (size_t i = 0; i < b.dys.size(); ++i) {
      const int64_t rows = b.dys[i].size(1);
      if (!wants(b.needs_dweight, i) || rows == 0) continue;
      at::Tensor part = out.narrow(0, done, rows);
      at::mm_out(part, b.dys[i].t(), as_matrix(*b.x));
      done += rows;
    }
    return out;
  }
  FP8_CHECK_VALUE(b.x_t_scale.has_value(),
                  "fp8::_merged_backward: expected x_t_scale with the recipe '", b.recipe.name,
                  "', got None");
  const Side x_t =
      operand::given("_merged_backward", "x_t", *b.x, *b.x_t_scale, b.recipe.granularity, b.k);
  const auto product = [&](const Side& rows, const at::Tensor& into) {
    return matmul(rows, x_t,
                  {.dtype = out.scalar_type(),
                   .fast_accum = b.recipe.fast_wgrad,
                   .into = into,
                   .overwrite = into.defined()});
  };
  if (out.size(0) == dy_t.rows) return product(dy_t, {});
  // Scales of blocks lie in columns, of which a product takes all: what is not wanted is made too.
  const bool in_blocks = is_blockwise(b.recipe.granularity);
  const at::Tensor all = in_blocks ? product(dy_t, {}) : at::Tensor();
  int64_t start = 0;
  for (size_t i = 0; i < b.dys.size();) {
    int64_t rows = b.dys[i].size(1);
    const bool wanted = wants(b.needs_dweight, i);
    for (++i; i < b.dys.size() && wants(b.needs_dweight, i) == wanted; ++i) {
      rows += b.dys[i].size(1);
    }
    if (wanted && rows > 0) {
      at::Tensor run = out.narrow(0, done, rows);
      if (in_blocks) {
        run.copy_(all.narrow(0, start, rows));
      } else {
        product(rows_of(dy_t, start, rows), run);
      }
      done += rows;
    }
    start += rows;
  }
  return out;
}

}  // namespace

std::optional<at::Tensor> merged::joined_bias(at::TensorList weights,
                                              const OptionalTensors& biases) {
  std::vector<at::Tensor> parts;
  bool any = false;
  for (size_t i = 0; i < weights.size(); ++i) {
    const OptionalTensor bias = bias_of(biases, i);
    any = any || bias.has_value();
    if (bias) parts.push_back(*bias);
    if (!bias && biases) {
      parts.push_back(at::zeros_symint({weights[i].sym_size(0)}, weights[i].options()));
    }
  }
  return any ? std::optional(at::cat(parts)) : std::nullopt;
}

std::vector<at::Tensor> merged::parts_of(const at::Tensor& y, at::TensorList weights) {
  std::vector<at::Tensor> parts;
  c10::SymInt start = 0;
  for (const at::Tensor& weight : weights) {
    parts.push_back(y.narrow_symint(-1, start, weight.sym_size(0)));
    start = start + weight.sym_size(0);
  }
  return parts;
}

namespace kernel {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> _merged_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensor& bias, int64_t recipe_id,
    bool save_x_t, bool save_weight_amax, const OptionalTensor& history) {
  merged::check_forward(x, weights, bias, recipe_id, history);
  const Recipe recipe = recipe_at(recipe_id);
  const bool invariant = batch_invariant::checked("merged_linear", recipe, /*static_input=*/false);
  const bool keep_amax = save_weight_amax && is_tensorwise(recipe);
  const bool x_t = save_x_t && recipe.fp8_wgrad;
  const c10::DeviceGuard guard(x.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Operand qx =
      operand::remembered_input(x, {.dtype = recipe.forward_dtype,
                                    .granularity = recipe.granularity,
                                    .along_rows = x_t,
                                    .power_of_two = recipe.power_of_two,
                                    .scaling = linear::scaling_of(history, Role::kInput)});
  const std::vector<at::Tensor> parts = not_empty(weights);
  const int64_t features = sum_of(weights, 0).expect_int();
  const std::vector<int64_t> shape = with_last(x.sizes(), features);
  const auto kept = [&](bool keep, const at::Tensor& t) { return keep ? t : none_like(x); };
  Operand qw;
  if (!parts.empty()) {
    qw = operand::remembered_weights(parts, {.dtype = recipe.forward_dtype,
                                             .granularity = recipe.weight_granularity,
                                             .power_of_two = recipe.power_of_two,
                                             .scaling = linear::scaling_of(history, Role::kWeight),
                                             .keep_amax = keep_amax,
                                             .pdl = qx.launched && all_matrices(parts)});
  } else if (keep_amax) {
    qw.amax = at::zeros({}, x.options().dtype(at::kFloat));
  }
  at::Tensor y;
  if (x.numel() > 0 && !parts.empty()) {
    y = linear::forward_product(qx.along_cols, qw.along_cols, bias, x.scalar_type(), recipe,
                                invariant);
    y = y.view(shape);
  } else {
    y = at::zeros(shape, x.options());
    if (bias) y.add_(*bias);
  }
  return {y, kept(x_t, qx.along_rows.codes), kept(x_t, qx.along_rows.scales),
          kept(keep_amax, qw.amax)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _merged_backward(
    at::TensorList dys, const OptionalTensor& x, const OptionalTensor& x_t_scale,
    at::TensorList weights, const OptionalTensor& weight_amax, c10::SymInt in_features,
    int64_t recipe_id, bool needs_dx, int64_t needs_dweight, bool needs_dbias,
    const OptionalTensor& history) {
  merged::check_backward(dys, weights, in_features, needs_dx, recipe_id, history);
  const at::Tensor& like = dys.front();
  const c10::DeviceGuard guard(like.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  memory::drop_inputs();
  Backward b{.x = x,
             .x_t_scale = x_t_scale,
             .weights = weights,
             .weight_amax = weight_amax,
             .k = in_features.expect_int(),
             .recipe = recipe_at(recipe_id),
             .needs_dweight = needs_dweight,
             .history = history};
  for (const at::Tensor& dy : dys) b.dys.push_back(as_matrix(dy));
  const std::vector<at::Tensor> parts = not_empty(b.dys);
  at::Tensor dx;
  at::Tensor dweight;
  at::Tensor dbias;
  if (parts.empty() || b.k == 0) {
    if (needs_dx) dx = at::zeros({b.dys.front().size(0), b.k}, like.options());
    if (needs_dweight != 0) {
      int64_t rows = 0;
      for (size_t i = 0; i < b.dys.size(); ++i)
        rows += wants(needs_dweight, i) ? b.dys[i].size(1) : 0;
      dweight = at::zeros({rows, b.k}, like.options());
    }
  } else {
    const bool along_rows = needs_dweight != 0 && b.recipe.fp8_wgrad;
    const bool sums = needs_dbias && b.dys.front().size(0) <= core::kMaxRowsPerAxisPass;
    Operand qdy;
    if (needs_dx || along_rows) {
      qdy = operand::make_joined(
          parts, /*side_by_side=*/true,
          {.dtype = b.recipe.grad_dtype,
           .granularity = b.recipe.granularity,
           .along_cols = needs_dx,
           .along_rows = along_rows,
           .power_of_two = b.recipe.power_of_two,
           .scaling = linear::scaling_of(history, Role::kGradOutput),
           .column_sum = sums ? std::optional(like.scalar_type()) : std::nullopt});
    }
    dbias = qdy.column_sum;
    if (needs_dx) dx = input_gradient(b, qdy);
    qdy.along_cols = {};
    if (needs_dweight != 0) dweight = weight_gradients(b, qdy.along_rows);
  }
  if (needs_dbias && !dbias.defined()) {
    std::vector<at::Tensor> sums;
    for (const at::Tensor& dy : b.dys) sums.push_back(at::sum(dy, 0));
    dbias = at::cat(sums);
  }
  if (dx.defined()) dx = dx.view(with_last(like.sizes(), b.k));
  return {or_none(dx, like), or_none(dweight, like), or_none(dbias, like)};
}

}  // namespace kernel

namespace composite {

std::vector<at::Tensor> merged_linear(const at::Tensor& x, at::TensorList weights,
                                      const OptionalTensors& biases, std::string_view recipe,
                                      const OptionalTensor& history) {
  const int64_t id = recipe_id(recipe);
  check_merged(x, weights, biases, id, history);
  const auto forward = x.is_meta() ? meta::_merged_forward : kernel::_merged_forward;
  const at::Tensor y =
      std::get<0>(forward(x, weights, merged::joined_bias(weights, biases), id, /*save_x_t=*/false,
                          /*save_weight_amax=*/false, history));
  return merged::parts_of(y, weights);
}

std::tuple<at::Tensor, at::Tensor> _merged_linear_functional(const at::Tensor& x,
                                                             at::TensorList weights,
                                                             const OptionalTensors& biases,
                                                             std::string_view recipe,
                                                             const OptionalTensor& history) {
  const int64_t id = recipe_id(recipe);
  check_merged(x, weights, biases, id, history);
  OptionalTensor next;
  if (history) next = history->clone();
  const auto forward = x.is_meta() ? meta::_merged_forward : kernel::_merged_forward;
  const at::Tensor y =
      std::get<0>(forward(x, weights, merged::joined_bias(weights, biases), id, /*save_x_t=*/false,
                          /*save_weight_amax=*/false, next));
  return {y, next ? *next : none_like(x)};
}

}  // namespace composite

}  // namespace fp8
