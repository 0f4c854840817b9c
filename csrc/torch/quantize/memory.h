// Quantized tensors that are used more than once: quantize each once.
//
// Inputs: q/k/v and gate/up projections read one activation. The quantized form of the last two
// inputs is kept while their tensors live, until the next backward, and reused for the same tensor
// (identity, version counter, memory) in the same recipe with its options, stream and CUDA graph
// capture. Only eager calls under autograd take part, and only inputs with a past in the graph:
// results of other operators, made anew in each step, and no part of a parameter. A long-lived
// buffer may be filled by something that counts no version (a Triton kernel, a graph replay,
// p.data), so it is quantized in every call. So is an input with a static scale, which is such a
// buffer, as a rule one of each layer's own, and one with a history, which the call moves on:
// nothing that they made is kept, and nothing that is kept serves them.
//
// Weights: kept only inside fp8.cached_weights(model), where the user says that they do not change.
// A version counter does not see every update of a weight (p.data.copy_, all-gathers, fused
// optimizers), so nothing is assumed outside of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "torch/quantize/operand.h"

namespace fp8::operand {

// make(as_matrix(x), request), or what is remembered of it.
Operand remembered_input(const at::Tensor& x,  // [..., K]
                         const QuantizeRequest& request);

// The same of a weight, or make_stack of the experts' weights. Outside of cached_weights nothing is
// remembered. Inside, each side is made once, tensorwise both as soon as a backward may come
// (request.keep_amax or request.along_rows), since they share a scale; and where a context captures
// all sides that graphs read of the weight. A stack may be a view of what cache_weights was given:
// it is recognized by its memory.
Operand remembered_weight(const at::Tensor& weight,  // [N, K], or [groups, N, K]
                          const QuantizeRequest& request);

// The same of weights that are one operand, one below the other. It is remembered where all of them
// are in cached_weights, and goes when one of them may have changed.
Operand remembered_weights(at::TensorList weights,  // [N_i, K], not empty
                           const QuantizeRequest& request);

}  // namespace fp8::operand

namespace fp8::memory {

// While one is alive on a thread, remembered_input may remember.
class EagerScope {
 public:
  EagerScope();
  ~EagerScope();
  EagerScope(const EagerScope&) = delete;
  EagerScope& operator=(const EagerScope&) = delete;
};

// Lets go of inputs whose tensors are gone; remembered_input begins with it.
void drop_gone_inputs();
// Lets go of all: a backward ends what the forward shared.
void drop_inputs();

// fp8.cached_weights: contexts may nest and share weights. captures: a CUDA graph that is captured
// inside reads what was made before the capture (torch/quantize/graph_codes.h).
void cache_weights(const std::vector<at::Tensor>& weights, bool captures);
void uncache_weights(const std::vector<at::Tensor>& weights, bool captures);
// What was made of these weights, none: of all, in the open contexts. They may have changed, and no
// counter says so.
void forget_weights(const std::vector<at::Tensor>& changed);

}  // namespace fp8::memory
