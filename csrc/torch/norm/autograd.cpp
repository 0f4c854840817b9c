// Gradients of the norms. Saved is what was normed, rstd (and mean) of each row, and the weight.
// Where a residual was added, the gradient of the sum joins dx in the same pass; so does that of x
// from elsewhere, where x is handed on.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "host/ranges.h"
#include "torch/common/messages.h"
#include "torch/common/operators.h"
#include "torch/norm/norm_ops.h"
#include "torch/quantize/memory.h"

namespace fp8::autograd {
namespace {

using core::NormForm;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& backward_op() {
  static const auto op = find<decltype(kernel::_norm_backward)>("fp8::_norm_backward");
  return op;
}

// Another tensor of x's memory, and of its count of writes.
at::Tensor handed_on(const at::Tensor& x) {
  at::Tensor same = at::alias(x);
  torch::autograd::impl::set_version_counter(same, torch::autograd::impl::version_counter(x));
  return same;
}

// y; and the sum where there is a residual, or x where it is handed on.
class Norm : public torch::autograd::Function<Norm> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, double eps, int64_t form,
                               bool hands_on) {
    const Range range("fp8::norm");
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<decltype(kernel::_norm_forward)>("fp8::_norm_forward");
    const bool layer = static_cast<NormForm>(form) == NormForm::kLayer;
    const int64_t foreseen = (x.requires_grad() ? kX : 0) | (wants_grad(residual) ? kResidual : 0) |
                             (wants_grad(weight) ? kWeight : 0) | (wants_grad(bias) ? kBias : 0) |
                             (residual ? kHasResidual : 0) | (weight ? kHasWeight : 0);
    ctx->set_materialize_grads(false);  // one of two outputs may have no gradient
    const memory::EagerScope remembers;
    auto [y, sum, mean, rstd] = op.call(x, residual, weight, bias, eps, form);
    const at::Tensor none;
    ctx->save_for_backward({residual ? sum : x, layer ? mean : none, rstd, weight.value_or(none)});
    ctx->saved_data["call"] = foreseen | form << kFormShift;
    if (wants_grad(bias)) {
      ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias->scalar_type());
    }
    if (residual) return {y, sum};
    if (hands_on) return {y, handed_on(x)};
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Range range("fp8::norm backward");
    variable_list result(7);
    const int64_t call = ctx->saved_data["call"].toInt();
    const int64_t needs = asked_for(ctx, call);
    const bool needs_dx = (needs & (kX | kResidual)) != 0;
    const at::Tensor& dy = grads[0];
    const at::Tensor dsum = grads.size() > 1 ? grads[1] : at::Tensor();
    at::Tensor dx = dsum;
    if (dy.defined()) {
      const variable_list saved = ctx->get_saved_variables();
      std::optional<at::ScalarType> bias_dtype;
      if ((needs & kBias) != 0) {
        bias_dtype = static_cast<at::ScalarType>(ctx->saved_data["bias_dtype"].toInt());
      }
      auto [dnormed, dweight, dbias] = backward_op().call(
          dy, saved[0], optional(saved[1]), saved[2], optional(saved[3]), optional(dsum),
          bias_dtype, call >> kFormShift, needs_dx, (needs & kWeight) != 0, (needs & kBias) != 0);
      if (needs_dx) dx = dnormed;
      if ((needs & kWeight) != 0) result[2] = dweight;
      if ((needs & kBias) != 0) result[3] = dbias;
    }
    if ((needs & kX) != 0) result[0] = dx;
    if ((needs & kResidual) != 0) result[1] = dx;
    return result;
  }

 private:
  // Of what the forward could foresee, what this backward is for. An input that is not there has no
  // number among those that autograd counts.
  static int64_t asked_for(const AutogradContext* ctx, int64_t call) {
    int64_t needs = 0;
    size_t input = 0;
    const auto next = [&](int64_t bit) {
      if ((call & bit) != 0 && ctx->needs_input_grad(input)) needs |= bit;
      ++input;
    };
    next(kX);
    if ((call & kHasResidual) != 0) next(kResidual);
    if ((call & kHasWeight) != 0) next(kWeight);
    if ((call & kBias) != 0) next(kBias);
    return needs;
  }

  static constexpr int64_t kX = 1;
  static constexpr int64_t kResidual = 2;
  static constexpr int64_t kWeight = 4;
  static constexpr int64_t kBias = 8;
  static constexpr int64_t kHasResidual = 16;
  static constexpr int64_t kHasWeight = 32;
  static constexpr int64_t kFormShift = 6;
};

// The gradient of a gradient: refused when it is asked for, not when a graph is merely created.
class NoDoubleBackward : public torch::autograd::Function<NoDoubleBackward> {
 public:
  static variable_list forward(AutogradContext* /*ctx*/, const at::Tensor& /*dy*/,
                               const at::Tensor& /*x*/, const at::Tensor& /*weight*/,
                               const at::Tensor& dx, const at::Tensor& dweight,
                               const at::Tensor& dbias) {
    return {dx, dweight, dbias};
  }
  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "fp8::_norm_backward: expected one backward, got a double "
                                "backward: use F.rms_norm or F.layer_norm where second "
                                "derivatives are needed");
  }
};

void refuse_tangents(const char* op, const at::Tensor& x, const OptionalTensor& residual,
                     const OptionalTensor& weight, const OptionalTensor& bias) {
  const auto has_tangent = [](const OptionalTensor& t) {
    return t && t->defined() && t->_fw_grad(0).defined();
  };
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(x) && !has_tangent(residual) && !has_tangent(weight) && !has_tangent(bias),
      join("fp8::", op,
           ": expected reverse mode, got a tangent: forward-mode AD (jvp) "
           "is not supported"));
}

bool needs_graph(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                 const OptionalTensor& bias) {
  return at::GradMode::is_enabled() &&
         (x.requires_grad() || wants_grad(residual) || wants_grad(weight) || wants_grad(bias));
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const OptionalTensor& weight, std::optional<double> eps,
                    std::string_view form_name) {
  const NormForm form = norm_form("rms_norm", form_name);
  check_norm("rms_norm", x, std::nullopt, weight, std::nullopt);
  if (scales_wider(form, x, weight)) return *weight * rms_norm(x, std::nullopt, eps, form_name);
  refuse_tangents("rms_norm", x, std::nullopt, weight, std::nullopt);
  if (!needs_graph(x, std::nullopt, weight, std::nullopt)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return composite::rms_norm(x, weight, eps, form_name);
  }
  return Norm::apply(x, std::nullopt, weight, std::nullopt, norm_eps(eps),
                     static_cast<int64_t>(form), false)[0];
}

at::Tensor layer_norm(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      double eps) {
  check_norm("layer_norm", x, std::nullopt, weight, bias);
  refuse_tangents("layer_norm", x, std::nullopt, weight, bias);
  if (!needs_graph(x, std::nullopt, weight, bias)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return composite::layer_norm(x, weight, bias, eps);
  }
  return Norm::apply(x, std::nullopt, weight, bias, eps, static_cast<int64_t>(NormForm::kLayer),
                     false)[0];
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const OptionalTensor& weight,
                                                std::optional<double> eps,
                                                std::string_view form_name) {
  const NormForm form = norm_form("add_rms_norm", form_name);
  check_norm("add_rms_norm", x, residual, weight, std::nullopt);
  if (scales_wider(form, x, weight)) {
    auto [y, sum] = add_rms_norm(x, residual, std::nullopt, eps, form_name);
    return {*weight * y, sum};
  }
  refuse_tangents("add_rms_norm", x, residual, weight, std::nullopt);
  if (!needs_graph(x, residual, weight, std::nullopt)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return composite::add_rms_norm(x, residual, weight, eps, form_name);
  }
  const variable_list made = Norm::apply(x, OptionalTensor(residual), weight, std::nullopt,
                                         norm_eps(eps), static_cast<int64_t>(form), false);
  return {made[0], made[1]};
}

std::tuple<at::Tensor, at::Tensor> _norm_and_input(const at::Tensor& x,
                                                   const OptionalTensor& weight,
                                                   const OptionalTensor& bias, double eps,
                                                   int64_t form) {
  check_norm("_norm_and_input", x, std::nullopt, weight, bias);
  if (scales_wider(static_cast<NormForm>(form), x, weight)) {
    auto [y, same] = _norm_and_input(x, std::nullopt, std::nullopt, eps, form);
    return {*weight * y, same};
  }
  refuse_tangents("_norm_and_input", x, std::nullopt, weight, bias);
  if (!needs_graph(x, std::nullopt, weight, bias)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return composite::_norm_and_input(x, weight, bias, eps, form);
  }
  const variable_list made = Norm::apply(x, std::nullopt, weight, bias, eps, form, true);
  return {made[0], made[1]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _norm_backward(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& mean, const at::Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& add,
    std::optional<at::ScalarType> bias_dtype, int64_t form, bool needs_dx, bool needs_dweight,
    bool needs_dbias) {
  std::tuple<at::Tensor, at::Tensor, at::Tensor> grads;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    grads = backward_op().call(dy, x, mean, rstd, weight, add, bias_dtype, form, needs_dx,
                               needs_dweight, needs_dbias);
  }
  if (!at::GradMode::is_enabled()) return grads;
  if (!dy.requires_grad() && !wants_grad(weight) && !x.requires_grad()) return grads;
  auto& [dx, dweight, dbias] = grads;
  const variable_list out =
      NoDoubleBackward::apply(dy, x, weight.value_or(at::Tensor()), dx, dweight, dbias);
  return {out[0], out[1], out[2]};
}

}  // namespace fp8::autograd
