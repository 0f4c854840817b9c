// Quantized tensors that are used more than once: quantize each once.
//
// Inputs: q/k/v and gate/up projections read one activation. The quantized form of the last two
// inputs is kept while their tensors live, until the next backward, and reused for the same tensor
// (identity, version counter, memory) in the same recipe with its options, stream and CUDA graph
// capture. Only eager calls under autograd take part, and only inputs with a history in the graph:
// results of other operators, made anew in each step, and no part of a parameter. A long-lived
// buffer may be filled by
// something that counts no version (a Triton kernel, a graph replay, p.data), so it is quantized in
// every call. So is an input with a given scale, which is such a buffer, as a rule one of each
// layer's own: nothing that it made is kept, and nothing that is kept serves it.
//
// Weights: kept only inside fp8.cached_weights(model), where the user says that they do not change.
// A version counter does not see every update of a weight (p.data.copy_, all-gathers, fused
// optimizers), so nothing is assumed outside of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <utility>
#include <vector>

#include "quantize/quantize.h"

namespace fp8::memory {

// While one is alive on a thread, quantize_input may remember.
class EagerScope {
 public:
  EagerScope();
  ~EagerScope();
  EagerScope(const EagerScope&) = delete;
  EagerScope& operator=(const EagerScope&) = delete;
};

// quantize_matrix(as_matrix(x), request), or what is remembered of it.
QuantizedMatrix quantize_input(const at::Tensor& x, const QuantizeRequest& request);

// Quantized weight. Outside of cached_weights: quantize_matrix(as_matrix(weight), request). Inside:
// made once, with the transposed copy as soon as a backward may come (request.keep_amax or
// request.data_t).
QuantizedMatrix quantize_weight(const at::Tensor& weight, const QuantizeRequest& request);

// The weight [experts, ..] of grouped matmuls, quantized in one of two forms by `make`, which gives
// codes and scales. Inside cached_weights each form is made once, and anew with other scales.
// `weight` may be a view of what cache_weights was given: it is recognized by its memory. `stored`
// is its contiguous form, the same memory; made below autograd, it has a version counter of its
// own, so weight's is the one that counts.
std::pair<at::Tensor, at::Tensor> remember_weight(
    const at::Tensor& weight, const at::Tensor& stored, int form, bool power_of_two,
    const std::function<std::pair<at::Tensor, at::Tensor>()>& make);

// Lets go of inputs whose tensors are gone; quantize_input begins with it.
void drop_gone_inputs();
// Lets go of all: a backward ends what the forward shared.
void drop_inputs();

// fp8.cached_weights: contexts may nest and share weights.
void cache_weights(const std::vector<at::Tensor>& weights);
void uncache_weights(const std::vector<at::Tensor>& weights);
// What was made of these weights, none: of all, in the open contexts. They may have changed, and no
// counter says so.
void forget_weights(const std::vector<at::Tensor>& changed);

}  // namespace fp8::memory
