// Rotary position embedding on tensors: rows where they lie, cos and sin broadcast by strides, and
// places for the results.
#include "cpu/rope.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <numeric>

#include "torch/common/cuda_context.h"
#include "torch/common/operators.h"
#include "torch/common/tensors.h"
#include "torch/rope/rope_ops.h"

namespace fp8 {
namespace {

using core::RopeTensor;

at::ScalarType result_dtype(const at::Tensor& x, const at::Tensor& cos, const RopeForm& form,
                            std::optional<at::ScalarType> given) {
  const at::ScalarType dtype = given ? *given
                               : form.rounding == RopeRounding::kEach
                                   ? at::promote_types(x.scalar_type(), cos.scalar_type())
                                   : x.scalar_type();
  const bool widens = dtype != x.scalar_type();
  FP8_CHECK_TYPE(!widens || ((dtype == at::kFloat || x.scalar_type() == at::kFloat) &&
                             is_high_precision(dtype) && cos.scalar_type() == at::kFloat),
                 "fp8::_rope: expected dtype ", x.scalar_type(),
                 ", or with cos in float32 one of both in float32, got ", dtype);
  return dtype;
}

template <typename Int>
std::vector<Int> strides_in(c10::ArrayRef<Int> sizes, at::IntArrayRef order) {
  std::vector<Int> strides(sizes.size(), Int(1));
  Int step(1);
  for (auto i = static_cast<int64_t>(order.size()) - 1; i >= 0; --i) {
    strides[order[i]] = step;
    step = step * std::max(sizes[order[i]], Int(1));
  }
  return strides;
}

std::vector<int64_t> checked_order(const at::Tensor& x, at::IntArrayRef given) {
  if (given.empty()) return order_of(x);
  std::vector<int64_t> order = given.vec();
  std::vector<int64_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  bool whole = static_cast<int64_t>(order.size()) == x.dim();
  for (size_t i = 0; i < sorted.size(); ++i) whole = whole && sorted[i] == static_cast<int64_t>(i);
  FP8_CHECK_VALUE(whole && order.back() == x.dim() - 1, "fp8::_rope: expected an order of ",
                  x.dim(), " dimensions with the last one last, got ",
                  c10::fromIntArrayRefSlow(given));
  return order;
}

// Columns contiguous.
at::Tensor with_rows(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous();
}

// Sizes and strides of x's leading dimensions, the last of them last of three.
void walk(const at::Tensor& x, int64_t (&strides)[3], int64_t (*sizes)[3] = nullptr) {
  for (int64_t i = 2, dim = x.dim() - 2; dim >= 0; --i, --dim) {
    strides[i] = x.size(dim) == 1 ? 0 : x.stride(dim);
    if (sizes != nullptr) (*sizes)[i] = x.size(dim);
  }
}

struct CheckedCall {
  RopeForm form;
  const at::Tensor& any;  // q, or k where there is none
};

CheckedCall checked_call(const OptionalTensor& q, const OptionalTensor& k, const at::Tensor& cos,
                         const at::Tensor& sin, const c10::SymInt& rotary_dim,
                         int64_t packed_form) {
  const RopeForm form = rope_form("_rope", packed_form);
  check_rope("_rope", q, k, cos, sin, rotary_dim);
  return {form, q ? *q : *k};
}

RopeTensor rope_tensor(const at::Tensor& x, const at::Tensor& y, const at::Tensor& cos,
                       const at::Tensor& sin) {
  RopeTensor tensor{.x = x.const_data_ptr(), .y = y.mutable_data_ptr()};
  walk(x, tensor.x_strides, &tensor.sizes);
  walk(y, tensor.y_strides);
  walk(cos, tensor.cos_strides);
  walk(sin, tensor.sin_strides);
  return tensor;
}

}  // namespace

std::vector<int64_t> order_of(const at::Tensor& x) {
  std::vector<int64_t> order(x.dim());
  std::iota(order.begin(), order.end(), 0);
  if (x.dim() < 3) return order;
  const c10::SymIntArrayRef strides = x.sym_strides();
  std::stable_sort(order.begin(), order.end() - 1,
                   [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

std::tuple<at::Tensor, at::Tensor> composite::rope(const at::Tensor& q, const OptionalTensor& k,
                                                   const at::Tensor& cos, const at::Tensor& sin,
                                                   std::string_view layout,
                                                   std::optional<c10::SymInt> rotary_dim,
                                                   std::string_view rounding) {
  const RopeForm form = rope_form("rope", layout, rounding);
  FP8_CHECK_VALUE(cos.dim() > 0, "fp8::rope: expected cos of at least one dimension, got a scalar");
  const c10::SymInt rotary = rotary_dim ? *rotary_dim : cos.sym_size(-1);
  check_rope("rope", q, k, cos, sin, rotary);
  static const auto op = find<decltype(kernel::_rope)>("fp8::_rope");
  return op.call(q, k, cos, sin, rotary, form.packed(), std::nullopt, {}, {});
}

std::tuple<at::Tensor, at::Tensor> kernel::_rope(const OptionalTensor& q, const OptionalTensor& k,
                                                 const at::Tensor& cos, const at::Tensor& sin,
                                                 c10::SymInt rotary_dim, int64_t packed_form,
                                                 std::optional<at::ScalarType> dtype,
                                                 at::IntArrayRef q_order, at::IntArrayRef k_order) {
  const CheckedCall call = checked_call(q, k, cos, sin, rotary_dim, packed_form);
  const at::Tensor& any = call.any;
  const c10::DeviceGuard guard(any.device());
  const at::ScalarType y_dtype = result_dtype(any, cos, call.form, dtype);
  const int64_t rotary = rotary_dim.expect_int();
  const at::Tensor cos_rows = with_rows(cos);
  const at::Tensor sin_rows = with_rows(sin);
  core::RopeArgs args{
      .x_dtype = to_core(any.scalar_type()),
      .y_dtype = to_core(y_dtype),
      .cos_dtype = to_core(cos.scalar_type()),
      .layout = call.form.layout,
      .cols = any.size(-1),
      .rotary = rotary,
      .per_pair = cos.size(-1) != rotary,
      .transposed = call.form.transposed,
      .rounds_products = call.form.rounding == RopeRounding::kEach ||
                         (call.form.rounding == RopeRounding::kSum && call.form.transposed),
      .keeps_minus_zero = call.form.keeps_minus_zero,
      .cos = cos_rows.const_data_ptr(),
      .sin = sin_rows.const_data_ptr()};
  at::Tensor rows[2];  // alive until the pass was launched
  const auto place = [&](const OptionalTensor& x, at::IntArrayRef order, int i) {
    if (!x) return none_like(any);
    const at::Tensor y = at::empty_strided(
        x->sizes(), strides_in(x->sizes(), checked_order(*x, order)), x->options().dtype(y_dtype));
    if (x->numel() == 0) return y;
    rows[i] = with_rows(*x);
    args.tensors[i] = rope_tensor(rows[i], y, cos_rows, sin_rows);
    return y;
  };
  const at::Tensor q_out = place(q, q_order, 0);
  const at::Tensor k_out = place(k, k_order, 1);
  FP8_RUN_PASS(rope, any, args);
  return {q_out, k_out};
}

std::tuple<at::Tensor, at::Tensor> meta::_rope(const OptionalTensor& q, const OptionalTensor& k,
                                               const at::Tensor& cos, const at::Tensor& sin,
                                               c10::SymInt rotary_dim, int64_t packed_form,
                                               std::optional<at::ScalarType> dtype,
                                               at::IntArrayRef q_order, at::IntArrayRef k_order) {
  const CheckedCall call = checked_call(q, k, cos, sin, rotary_dim, packed_form);
  const at::Tensor& any = call.any;
  const at::ScalarType y_dtype = result_dtype(any, cos, call.form, dtype);
  const auto like = [&](const OptionalTensor& x, at::IntArrayRef order) {
    if (!x) return none_like(any);
    return at::empty_strided_symint(x->sym_sizes(),
                                    strides_in(x->sym_sizes(), checked_order(*x, order)),
                                    x->options().dtype(y_dtype));
  };
  return {like(q, q_order), like(k, k_order)};
}

}  // namespace fp8
