// Batches of gradients: torch.autograd.grad(.., is_grads_batched=True) and vectorized jacobians map
// a backward by the older of PyTorch's two vmaps, whose fallback takes no operator that may write
// an argument. This is what that fallback does for the others: a call for each example, which move
// a history on in turn. The rules of the newer vmap are Python's (python/fp8/_native/functorch.py).
#include <ATen/ATen.h>
#include <ATen/LegacyBatchedTensorImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "torch/common/messages.h"
#include "torch/common/operators.h"
#include "torch/linear/linear.h"

namespace fp8::vmap {
namespace {

// The innermost batch that a tensor belongs to.
struct Batch {
  int64_t level = -1;
  int64_t size = 0;

  void join(const std::optional<at::Tensor>& t) {
    const auto* batched = t ? at::maybeGetBatchedImpl(*t) : nullptr;
    if (batched == nullptr) return;
    const at::BatchDim& last = batched->bdims().back();
    if (last.level() <= level) return;
    level = last.level();
    size = batched->value().size(last.dim());
  }
  // Of an example; of a tensor that has no batch, itself.
  std::optional<at::Tensor> example(const std::optional<at::Tensor>& t, int64_t i) const {
    if (!t) return std::nullopt;
    return at::_remove_batch_dim(*t, level, size, /*out_dim=*/0).select(0, i);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> _linear_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& x_t_scale, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& weight_amax, c10::SymInt in_features, int64_t recipe,
    bool needs_dx, bool needs_dweight, bool needs_dbias, const std::optional<at::Tensor>& main_grad,
    bool /*overwrite*/, const std::optional<at::Tensor>& history) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !main_grad,
      "fp8::fused_linear: expected one gradient for a weight with main_grad, "
      "got a batch of them (is_grads_batched=True)");
  Batch batch;
  for (const auto& t : {std::optional(dy), x, x_t_scale, weight, weight_amax}) batch.join(t);
  FP8_CHECK_VALUE(batch.size > 0, "fp8::_linear_backward: expected a batch of gradients, got none");
  static const auto op = find<decltype(kernel::_linear_backward)>("fp8::_linear_backward");
  std::array<std::vector<at::Tensor>, 3> results;
  for (int64_t i = 0; i < batch.size; ++i) {
    auto [dx, dweight, dbias] =
        op.call(*batch.example(dy, i), batch.example(x, i), batch.example(x_t_scale, i),
                batch.example(weight, i), batch.example(weight_amax, i), in_features, recipe,
                needs_dx, needs_dweight, needs_dbias, std::nullopt, /*overwrite=*/false, history);
    results[0].push_back(std::move(dx));
    results[1].push_back(std::move(dweight));
    results[2].push_back(std::move(dbias));
  }
  const auto joined = [&](const std::vector<at::Tensor>& examples) {
    return at::_add_batch_dim(at::stack(examples), /*batch_dim=*/0, batch.level);
  };
  return {joined(results[0]), joined(results[1]), joined(results[2])};
}

}  // namespace
}  // namespace fp8::vmap

TORCH_LIBRARY_IMPL(fp8, Batched, m) {
  m.impl("_linear_backward", TORCH_FN(fp8::vmap::_linear_backward));
}
