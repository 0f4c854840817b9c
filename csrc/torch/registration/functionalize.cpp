// What torch.compile makes of ops that write: out of place, then what was written is replaced. For
// custom ops PyTorch derives this in Python, but not where the written tensor is returned
// (scaled_mm_accumulate_), and where none is given AOTInductor (2.11) refuses what it derived for
// an op of one output (fused_linear without a history).
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "fp8/ops.h"
#include "torch/common/operators.h"
#include "torch/linear/linear.h"
#include "torch/matmul/scaled_mm.h"
#include "torch/merged/merged.h"

namespace fp8::functionalize {
namespace {

namespace impl = at::functionalization::impl;

at::Tensor unwrapped(const at::Tensor& t) {
  if (!impl::isFunctionalTensor(t)) return t;
  impl::sync(t);
  return impl::from_functional_tensor(t);
}

at::Tensor& scaled_mm_accumulate_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                                  const at::Tensor& scale_a, const at::Tensor& scale_b,
                                  bool fast_accum) {
  at::Tensor value = unwrapped(out);
  const at::Tensor plain_a = unwrapped(a);
  const at::Tensor plain_b = unwrapped(b);
  const at::Tensor plain_scale_a = unwrapped(scale_a);
  const at::Tensor plain_scale_b = unwrapped(scale_b);
  const at::AutoDispatchSkipFunctionalize below;
  if (!impl::isFunctionalTensor(out)) {
    fp8::scaled_mm_accumulate_(value, plain_a, plain_b, plain_scale_a, plain_scale_b, fast_accum);
    return out;
  }
  static const auto op =
      find<decltype(kernel::_scaled_mm_accumulate)>("fp8::_scaled_mm_accumulate");
  const at::Tensor sum = op.call(value, plain_a, plain_b, plain_scale_a, plain_scale_b, fast_accum);
  impl::replace_(out, sum);
  impl::commit_update(out);
  impl::sync(out);
  return out;
}

std::optional<at::Tensor> unwrapped(const std::optional<at::Tensor>& t) {
  return t ? std::optional(unwrapped(*t)) : std::nullopt;
}

at::Tensor fused_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, std::string_view recipe,
                        const std::optional<at::Tensor>& input_scale,
                        const std::optional<at::Tensor>& history) {
  const bool writes = history && impl::isFunctionalTensor(*history);
  const bool functional = writes || impl::isFunctionalTensor(x) ||
                          impl::isFunctionalTensor(weight) || impl::isFunctionalTensor(bias) ||
                          impl::isFunctionalTensor(input_scale);
  const at::Tensor plain_x = unwrapped(x);
  const at::Tensor plain_weight = unwrapped(weight);
  const std::optional<at::Tensor> plain_bias = unwrapped(bias);
  const std::optional<at::Tensor> plain_scale = unwrapped(input_scale);
  const std::optional<at::Tensor> plain_history = unwrapped(history);
  const at::AutoDispatchSkipFunctionalize below;
  if (!functional) {
    return fp8::fused_linear(plain_x, plain_weight, plain_bias, recipe, plain_scale, plain_history);
  }
  static const auto op =
      find<decltype(composite::_fused_linear_functional)>("fp8::_fused_linear_functional");
  const auto [y, next] =
      op.call(plain_x, plain_weight, plain_bias, recipe, plain_scale, plain_history);
  if (writes) {
    impl::replace_(*history, next);
    impl::commit_update(*history);
    impl::sync(*history);
  }
  return impl::to_functional_tensor(y);
}

// Its results share memory, which an operator in a graph may not say: the graph has the whole and
// views of it.
std::vector<at::Tensor> merged_linear(const at::Tensor& x, at::TensorList weights,
                                      const OptionalTensors& biases, std::string_view recipe,
                                      const std::optional<at::Tensor>& history) {
  const bool writes = history && impl::isFunctionalTensor(*history);
  bool functional = writes || impl::isFunctionalTensor(x);
  const at::Tensor plain_x = unwrapped(x);
  std::vector<at::Tensor> plain_weights;
  for (const at::Tensor& weight : weights) {
    functional = functional || impl::isFunctionalTensor(weight);
    plain_weights.push_back(unwrapped(weight));
  }
  OptionalTensors plain_biases;
  if (biases) plain_biases.emplace();
  for (size_t i = 0; biases && i < biases->size(); ++i) {
    const std::optional<at::Tensor> bias = biases->get(i);
    functional = functional || impl::isFunctionalTensor(bias);
    plain_biases->push_back(unwrapped(bias));
  }
  const std::optional<at::Tensor> plain_history = unwrapped(history);
  at::Tensor whole;
  {
    const at::AutoDispatchSkipFunctionalize below;
    if (!functional) {
      static const auto op = find<decltype(composite::merged_linear)>("fp8::merged_linear");
      return op.call(plain_x, plain_weights, plain_biases, recipe, plain_history);
    }
    static const auto op =
        find<decltype(composite::_merged_linear_functional)>("fp8::_merged_linear_functional");
    const auto [y, next] = op.call(plain_x, plain_weights, plain_biases, recipe, plain_history);
    if (writes) {
      impl::replace_(*history, next);
      impl::commit_update(*history);
      impl::sync(*history);
    }
    whole = impl::to_functional_tensor(y);
  }
  return merged::parts_of(whole, weights);
}

}  // namespace
}  // namespace fp8::functionalize

TORCH_LIBRARY_IMPL(fp8, Functionalize, m) {
  m.impl("scaled_mm_accumulate_", TORCH_FN(fp8::functionalize::scaled_mm_accumulate_));
  m.impl("fused_linear", TORCH_FN(fp8::functionalize::fused_linear));
  m.impl("merged_linear", TORCH_FN(fp8::functionalize::merged_linear));
}
