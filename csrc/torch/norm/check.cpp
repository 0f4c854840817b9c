// What the norms refuse, for every device and for fake tensors alike, and how they read options.
#include <ATen/ATen.h>

#include <array>
#include <limits>
#include <utility>

#include "torch/common/tensors.h"
#include "torch/norm/norm_ops.h"

namespace fp8 {
namespace {

using core::NormForm;

constexpr std::array<std::pair<std::string_view, NormForm>, 3> kForms{
    {{"scale_then_round", NormForm::kScaleThenRound},
     {"round_then_scale", NormForm::kRoundThenScale},
     {"scale_by_one_plus", NormForm::kScaleByOnePlus}}};

void check_parameter(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  FP8_CHECK_HIGH_PRECISION(op, name, t);
  FP8_CHECK_VALUE(t.dim() == 1 && t.sym_size(0) == x.sym_size(-1), "fp8::", op, ": expected ", name,
                  " of shape [K] = [", x.sym_size(-1), "], got ", t.sym_sizes());
  FP8_CHECK_SAME_DEVICE(op, name, t, "x", x);
}

}  // namespace

NormForm norm_form(const char* op, std::string_view name) {
  for (const auto& [text, form] : kForms) {
    if (text == name) return form;
  }
  FP8_CHECK_VALUE(false, "fp8::", op,
                  ": expected form 'scale_then_round', 'round_then_scale' or 'scale_by_one_plus', "
                  "got '",
                  name, "'");
}

double norm_eps(std::optional<double> eps) {
  return eps.value_or(std::numeric_limits<float>::epsilon());
}

bool scales_wider(NormForm form, const at::Tensor& x, const OptionalTensor& weight) {
  return form == NormForm::kRoundThenScale && weight &&
         at::promote_types(weight->scalar_type(), x.scalar_type()) != x.scalar_type();
}

void check_norm(const char* op, const at::Tensor& x, const OptionalTensor& residual,
                const OptionalTensor& weight, const OptionalTensor& bias) {
  FP8_CHECK_HIGH_PRECISION(op, "x", x);
  FP8_CHECK_VALUE(x.dim() >= 1, "fp8::", op,
                  ": expected x of at least one dimension, got a scalar");
  if (residual) {
    FP8_CHECK_TYPE(residual->scalar_type() == x.scalar_type(), "fp8::", op,
                   ": expected residual in x's dtype ", x.scalar_type(), ", got ",
                   residual->scalar_type());
    FP8_CHECK_VALUE(residual->sym_sizes() == x.sym_sizes(), "fp8::", op,
                    ": expected residual of x's shape ", x.sym_sizes(), ", got ",
                    residual->sym_sizes());
    FP8_CHECK_SAME_DEVICE(op, "residual", *residual, "x", x);
  }
  if (weight) check_parameter(op, "weight", *weight, x);
  if (bias) check_parameter(op, "bias", *bias, x);
}

}  // namespace fp8
