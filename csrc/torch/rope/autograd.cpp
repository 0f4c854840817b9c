// The gradient of rotary position embedding: the rotation back, which is the same operator with a
// form that is transposed, so that it is differentiable again. Saved are cos and sin alone. A
// gradient lies in memory as the tensor that it belongs to.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "host/ranges.h"
#include "torch/common/messages.h"
#include "torch/common/operators.h"
#include "torch/rope/rope_ops.h"

namespace fp8::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& rope_op() {
  static const auto op = find<decltype(kernel::_rope)>("fp8::_rope");
  return op;
}

class Rope : public torch::autograd::Function<Rope> {
 public:
  static variable_list forward(AutogradContext* ctx, const OptionalTensor& q,
                               const OptionalTensor& k, const at::Tensor& cos,
                               const at::Tensor& sin, const c10::SymInt& rotary_dim, int64_t form,
                               std::optional<at::ScalarType> dtype,
                               const std::vector<int64_t>& q_order,
                               const std::vector<int64_t>& k_order) {
    const Range range("fp8::rope");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);  // one of two results may have no gradient
    auto [q_out, k_out] = rope_op().call(q, k, cos, sin, rotary_dim, form, dtype, q_order, k_order);
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["rotary_dim"] = rotary_dim;
    ctx->saved_data["form"] = form;
    ctx->saved_data["dtype"] = static_cast<int64_t>((q ? *q : *k).scalar_type());
    if (q) ctx->saved_data["q_order"] = order_of(*q);
    if (k) ctx->saved_data["k_order"] = order_of(*k);
    if (!q) ctx->mark_non_differentiable({q_out});
    if (!k) ctx->mark_non_differentiable({k_out});
    return {q_out, k_out};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Range range("fp8::rope backward");
    variable_list result(9);
    // An input that is not there has no number among those that autograd counts.
    size_t input = 0;
    const auto wanted = [&](const char* order, const at::Tensor& grad) -> OptionalTensor {
      if (ctx->saved_data.count(order) == 0) return std::nullopt;
      const bool needed = ctx->needs_input_grad(input++);
      return needed && grad.defined() ? OptionalTensor(grad) : std::nullopt;
    };
    const OptionalTensor dq = wanted("q_order", grads[0]);
    const OptionalTensor dk = wanted("k_order", grads[1]);
    if (!dq && !dk) return result;
    const auto order = [&](const char* name, bool given) {
      return given ? ctx->saved_data[name].toIntVector() : std::vector<int64_t>();
    };
    RopeForm form = rope_form("_rope", ctx->saved_data["form"].toInt());
    form.transposed = !form.transposed;
    const variable_list saved = ctx->get_saved_variables();
    auto [q_grad, k_grad] =
        rope_op().call(dq, dk, saved[0], saved[1], ctx->saved_data["rotary_dim"].toSymInt(),
                       form.packed(), static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt()),
                       order("q_order", dq.has_value()), order("k_order", dk.has_value()));
    if (dq) result[0] = q_grad;
    if (dk) result[1] = k_grad;
    return result;
  }
};

// Of a trace the order is part: a compiler may lay q out in another one.
std::vector<int64_t> known_order(const OptionalTensor& x, at::IntArrayRef given) {
  return x && given.empty() ? order_of(*x) : given.vec();
}

bool has_tangent(const OptionalTensor& t) { return t && t->defined() && t->_fw_grad(0).defined(); }

}  // namespace

std::tuple<at::Tensor, at::Tensor> _rope(const OptionalTensor& q, const OptionalTensor& k,
                                         const at::Tensor& cos, const at::Tensor& sin,
                                         c10::SymInt rotary_dim, int64_t form,
                                         std::optional<at::ScalarType> dtype,
                                         at::IntArrayRef q_order, at::IntArrayRef k_order) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(q) && !has_tangent(k) && !has_tangent(cos) && !has_tangent(sin),
      "fp8::rope: expected reverse mode, got a tangent: forward-mode AD (jvp) is not supported");
  const std::vector<int64_t> q_known = known_order(q, q_order);
  const std::vector<int64_t> k_known = known_order(k, k_order);
  if (at::GradMode::is_enabled()) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !wants_grad(cos) && !wants_grad(sin),
        "fp8::rope: expected cos and sin without a gradient, got one that requires grad: detach "
        "them, or rotate in plain torch operations");
    if (wants_grad(q) || wants_grad(k)) {
      const variable_list made =
          Rope::apply(q, k, cos, sin, rotary_dim, form, dtype, q_known, k_known);
      return {made[0], made[1]};
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return rope_op().call(q, k, cos, sin, rotary_dim, form, dtype, q_known, k_known);
}

}  // namespace fp8::autograd
