// Calls through the dispatcher, and what autograd kernels ask of their arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace fp8 {

// The operator of that name, "fp8::..."; look it up once: `static const auto op = find<..>(..)`.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool wants_grad(const std::optional<at::Tensor>& t) {
  return t.has_value() && t->defined() && t->requires_grad();
}

// A graph that saved the written tensor must notice; a tensor of inference mode has no counter.
inline void count_write(const std::optional<at::Tensor>& written) {
  if (written && !written->is_inference()) written->unsafeGetTensorImpl()->bump_version();
}

// A saved tensor as an argument: undefined is None.
inline std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional(t) : std::nullopt;
}

}  // namespace fp8
