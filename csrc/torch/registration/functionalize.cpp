// What torch.compile makes of the one in-place op: out of place, then `out` replaced. PyTorch
// derives this for its own ops only; a custom op that returns the tensor it writes brings its own.
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "fp8/ops.h"
#include "torch/common/operators.h"
#include "torch/matmul/scaled_mm.h"

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

}  // namespace
}  // namespace fp8::functionalize

TORCH_LIBRARY_IMPL(fp8, Functionalize, m) {
  m.impl("scaled_mm_accumulate_", TORCH_FN(fp8::functionalize::scaled_mm_accumulate_));
}
