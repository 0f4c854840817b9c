// The norms' operators on tensors: rows where they lie, parameters in a dtype that the kernels
// take, and places for the results.
#include "cpu/norm.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <array>

#include "torch/common/cuda_context.h"
#include "torch/common/operators.h"
#include "torch/common/tensors.h"
#include "torch/norm/norm_ops.h"
#include "torch/quantize/left_amax.h"

namespace fp8 {
namespace {

using core::NormForm;
using core::NormRows;

// A tensor whose rows a kernel can walk: itself, where its leading dimensions are no more than
// three once those that lie behind each other count as one, else a copy.
struct Rows {
  at::Tensor tensor;
  NormRows at;

  const void* data() const { return tensor.const_data_ptr(); }
};

Rows rows_of(const at::Tensor& x) {
  const int64_t last = x.dim() - 1;
  const int64_t cols = x.size(last);
  if (x.stride(last) == 1 || cols == 1) {
    std::array<int64_t, 3> sizes{1, 1, 1};
    std::array<int64_t, 3> strides{0, 0, 0};
    int64_t count = 0;
    bool fits = true;
    for (int64_t i = last - 1; i >= 0 && fits; --i) {
      if (x.size(i) == 1) continue;
      if (count > 0 && x.stride(i) == sizes[count - 1] * strides[count - 1]) {
        sizes[count - 1] *= x.size(i);
      } else if (count < 3) {
        sizes[count] = x.size(i);
        strides[count++] = x.stride(i);
      } else {
        fits = false;
      }
    }
    if (fits && count <= 1) return {x, {.stride0 = strides[0]}};
    if (fits) {
      return {x,
              {.n1 = sizes[1],
               .n2 = sizes[0],
               .stride0 = strides[2],
               .stride1 = strides[1],
               .stride2 = strides[0]}};
    }
  }
  return {x.contiguous(), {.stride0 = cols}};
}

std::optional<Rows> rows_of(const OptionalTensor& x) {
  return x ? std::optional(rows_of(*x)) : std::nullopt;
}

int64_t row_count(const at::Tensor& x) {
  return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
}

// Weight and bias, contiguous: in x's dtype if both are, else in fp32.
struct Parameters {
  at::Tensor weight;
  at::Tensor bias;
  at::ScalarType dtype;

  Parameters(const at::Tensor& x, const OptionalTensor& given_weight,
             const OptionalTensor& given_bias)
      : dtype(x.scalar_type()) {
    for (const auto& t : {given_weight, given_bias}) {
      if (t && t->scalar_type() != dtype) dtype = at::kFloat;
    }
    if (given_weight) weight = given_weight->to(dtype).contiguous();
    if (given_bias) bias = given_bias->to(dtype).contiguous();
  }
};

const void* data_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

core::NormArgs norm_args(const at::Tensor& x, const Parameters& parameters, int64_t form) {
  return {.form = static_cast<NormForm>(form),
          .dtype = to_core(x.scalar_type()),
          .rows = row_count(x),
          .cols = x.size(-1),
          .weight = data_of(parameters.weight),
          .bias = data_of(parameters.bias),
          .weight_dtype = to_core(parameters.dtype)};
}

bool is_layer(int64_t form) { return static_cast<NormForm>(form) == NormForm::kLayer; }

const auto& forward_op() {
  static const auto op = find<decltype(kernel::_norm_forward)>("fp8::_norm_forward");
  return op;
}

// y, and x + residual where there is one. A weight that is wider than x multiplies y afterwards.
std::tuple<at::Tensor, at::Tensor> normed(const at::Tensor& x, const OptionalTensor& residual,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          double eps, NormForm form) {
  const bool wider = scales_wider(form, x, weight);
  auto [y, sum, mean, rstd] = forward_op().call(x, residual, wider ? std::nullopt : weight, bias,
                                                eps, static_cast<int64_t>(form));
  return {wider ? *weight * y : y, sum};
}

}  // namespace

at::Tensor composite::rms_norm(const at::Tensor& x, const OptionalTensor& weight,
                               std::optional<double> eps, std::string_view form_name) {
  const NormForm form = norm_form("rms_norm", form_name);
  check_norm("rms_norm", x, std::nullopt, weight, std::nullopt);
  return std::get<0>(normed(x, std::nullopt, weight, std::nullopt, norm_eps(eps), form));
}

at::Tensor composite::layer_norm(const at::Tensor& x, const OptionalTensor& weight,
                                 const OptionalTensor& bias, double eps) {
  check_norm("layer_norm", x, std::nullopt, weight, bias);
  return std::get<0>(normed(x, std::nullopt, weight, bias, eps, NormForm::kLayer));
}

std::tuple<at::Tensor, at::Tensor> composite::add_rms_norm(const at::Tensor& x,
                                                           const at::Tensor& residual,
                                                           const OptionalTensor& weight,
                                                           std::optional<double> eps,
                                                           std::string_view form_name) {
  const NormForm form = norm_form("add_rms_norm", form_name);
  check_norm("add_rms_norm", x, residual, weight, std::nullopt);
  return normed(x, residual, weight, std::nullopt, norm_eps(eps), form);
}

std::tuple<at::Tensor, at::Tensor> composite::_norm_and_input(const at::Tensor& x,
                                                              const OptionalTensor& weight,
                                                              const OptionalTensor& bias,
                                                              double eps, int64_t form) {
  check_norm("_norm_and_input", x, std::nullopt, weight, bias);
  const auto as_form = static_cast<NormForm>(form);
  return {std::get<0>(normed(x, std::nullopt, weight, bias, eps, as_form)), x};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kernel::_norm_forward(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, int64_t form) {
  check_norm("_norm_forward", x, residual, weight, bias);
  const c10::DeviceGuard guard(x.device());
  const at::Tensor y = empty_on(x, x.sizes(), x.scalar_type());
  const at::Tensor sum = residual ? empty_on(x, x.sizes(), x.scalar_type()) : none_like(x);
  const int64_t count = row_count(x);
  const at::Tensor mean = empty_on(x, {is_layer(form) ? count : 0}, at::kFloat);
  const at::Tensor rstd = empty_on(x, {count}, at::kFloat);
  if (x.numel() == 0) {
    if (rstd.numel() > 0) rstd.zero_();  // rows without columns
    if (mean.numel() > 0) mean.zero_();
    return {y, sum, mean, rstd};
  }
  const Rows rows = rows_of(x);
  const std::optional<Rows> other = rows_of(residual);
  const Parameters parameters(x, weight, bias);
  core::NormForwardArgs args{.norm = norm_args(x, parameters, form),
                             .x = rows.data(),
                             .x_rows = rows.at,
                             .residual = other ? other->data() : nullptr,
                             .residual_rows = other ? other->at : NormRows{},
                             .eps = static_cast<float>(eps),
                             .y = y.mutable_data_ptr(),
                             .sum = residual ? sum.mutable_data_ptr() : nullptr,
                             .mean = is_layer(form) ? mean.mutable_data_ptr<float>() : nullptr,
                             .rstd = rstd.mutable_data_ptr<float>()};
  const memory::NormCall call(weight, x.size(-1));
  at::Tensor amax;
  if (call.leaves_amax()) {
    const int64_t parts = x.is_cuda() ? core::norm_amax_parts(args) : 1;
    if (parts > 0) {
      amax = empty_on(x, {parts}, at::kFloat);
      args.y_amax = amax.mutable_data_ptr<float>();
    }
  }
  FP8_RUN_PASS(norm_forward, x, args);
  call.wrote(y, amax);
  return {y, sum, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> kernel::_norm_backward(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& mean, const at::Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& add,
    std::optional<at::ScalarType> bias_dtype, int64_t form, bool needs_dx, bool needs_dweight,
    bool needs_dbias) {
  check_norm("_norm_backward", x, add, weight, std::nullopt);
  const c10::DeviceGuard guard(x.device());
  const int64_t cols = x.size(-1);
  const at::Tensor dx = needs_dx ? empty_on(x, x.sizes(), x.scalar_type()) : none_like(x);
  const Parameters parameters(x, weight, std::nullopt);
  const auto gradient = [&](bool needed) {
    return needed ? empty_on(x, {cols}, parameters.dtype) : none_like(x);
  };
  at::Tensor dweight = gradient(needs_dweight);
  at::Tensor dbias = gradient(needs_dbias);
  if (x.numel() == 0) {
    dweight.zero_();
    dbias.zero_();
  } else {
    const Rows x_rows = rows_of(x);
    const Rows dy_rows = rows_of(dy);
    const std::optional<Rows> other = rows_of(add);
    core::NormBackwardArgs args{.norm = norm_args(x, parameters, form),
                                .dy = dy_rows.data(),
                                .dy_rows = dy_rows.at,
                                .x = x_rows.data(),
                                .x_rows = x_rows.at,
                                .add = other ? other->data() : nullptr,
                                .add_rows = other ? other->at : NormRows{},
                                .mean = mean ? mean->const_data_ptr<float>() : nullptr,
                                .rstd = rstd.const_data_ptr<float>(),
                                .dx = needs_dx ? dx.mutable_data_ptr() : nullptr,
                                .dweight = needs_dweight ? dweight.mutable_data_ptr() : nullptr,
                                .dbias = needs_dbias ? dbias.mutable_data_ptr() : nullptr};
    at::Tensor workspace;
    if (x.is_cuda()) {
      workspace = empty_on(x, {core::norm_workspace_floats(args)}, at::kFloat);
      args.workspace = workspace.mutable_data_ptr<float>();
    }
    FP8_RUN_PASS(norm_backward, x, args);
  }
  if (needs_dweight && weight) dweight = dweight.to(weight->scalar_type());
  if (needs_dbias) dbias = dbias.to(bias_dtype.value_or(x.scalar_type()));
  return {dx, dweight, dbias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> meta::_norm_forward(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, double /*eps*/, int64_t form) {
  check_norm("_norm_forward", x, residual, weight, bias);
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  const auto like = [&](bool made) {
    return made ? at::empty_symint(x.sym_sizes(), x.options()) : none_like(x);
  };
  const auto per_row = [&](bool made) {
    return at::empty_symint({made ? rows : c10::SymInt(0)}, x.options().dtype(at::kFloat));
  };
  return {like(true), like(residual.has_value()), per_row(is_layer(form)), per_row(true)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> meta::_norm_backward(
    const at::Tensor& /*dy*/, const at::Tensor& x, const OptionalTensor& /*mean*/,
    const at::Tensor& /*rstd*/, const OptionalTensor& weight, const OptionalTensor& add,
    std::optional<at::ScalarType> bias_dtype, int64_t /*form*/, bool needs_dx, bool needs_dweight,
    bool needs_dbias) {
  check_norm("_norm_backward", x, add, weight, std::nullopt);
  const auto gradient = [&](bool needed, at::ScalarType dtype) {
    return needed ? at::empty_symint({x.sym_size(-1)}, x.options().dtype(dtype)) : none_like(x);
  };
  return {needs_dx ? at::empty_symint(x.sym_sizes(), x.options()) : none_like(x),
          gradient(needs_dweight, weight ? weight->scalar_type() : x.scalar_type()),
          gradient(needs_dbias, bias_dtype.value_or(x.scalar_type()))};
}

}  // namespace fp8
