// Batches of gradients: torch.autograd.grad(.., is_grads_batched=True) and vectorized jacobians map
// a backward by the older of PyTorch's two vmaps, whose fallback takes no operator that may write
// an argument. This is what that fallback does for the others: a call for each example, which move
// a history on in turn. The rules of the newer vmap are Python's (python/fp8/_native/functorch.py).
#include <ATen/ATen.h>
#include <ATen/LegacyBatchedTensorImpl.h>
#include <torch/library.h>

#include <vector>

#include "torch/common/messages.h"

namespace fp8::vmap {
namespace {

// The innermost batch that a tensor belongs to.
struct Batch {
  int64_t level = -1;
  int64_t size = 0;

  void join(const c10::IValue& value) {
    const auto* batched = value.isTensor() ? at::maybeGetBatchedImpl(value.toTensor()) : nullptr;
    if (batched == nullptr) return;
    const at::BatchDim& last = batched->bdims().back();
    if (last.level() <= level) return;
    level = last.level();
    size = batched->value().size(last.dim());
  }
  // Of an example; what has no batch, itself.
  c10::IValue example(const c10::IValue& value, int64_t i) const {
    if (!value.isTensor() || at::maybeGetBatchedImpl(value.toTensor()) == nullptr) return value;
    return at::_remove_batch_dim(value.toTensor(), level, size, /*out_dim=*/0).select(0, i);
  }
};

bool is_main_grad(const c10::Argument& argument) { return argument.name().ends_with("main_grad"); }

// Of a backward whose arguments are single tensors.
void call_each(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  const std::vector<c10::IValue> arguments = torch::jit::pop(*stack, count);
  Batch batch;
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK_NOT_IMPLEMENTED(!is_main_grad(schema.arguments()[i]) || arguments[i].isNone(),
                                schema.name(),
                                ": expected one gradient for a weight with main_grad, "
                                "got a batch of them (is_grads_batched=True)");
    batch.join(arguments[i]);
  }
  FP8_CHECK_VALUE(batch.size > 0, schema.name(), ": expected a batch of gradients, got none");
  std::vector<std::vector<at::Tensor>> results(schema.returns().size());
  for (int64_t i = 0; i < batch.size; ++i) {
    torch::jit::Stack call;
    for (const c10::IValue& argument : arguments) call.push_back(batch.example(argument, i));
    op.callBoxed(call);
    for (size_t r = 0; r < results.size(); ++r) results[r].push_back(call[r].toTensor());
  }
  for (const std::vector<at::Tensor>& examples : results) {
    stack->emplace_back(at::_add_batch_dim(at::stack(examples), /*batch_dim=*/0, batch.level));
  }
}

}  // namespace
}  // namespace fp8::vmap

TORCH_LIBRARY_IMPL(fp8, Batched, m) {
  for (const char* op : {"_linear_backward", "_grouped_backward", "_moe_backward"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&fp8::vmap::call_each>());
  }
}
