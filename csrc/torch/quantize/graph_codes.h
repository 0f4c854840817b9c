// Codes of weights that CUDA graphs read, captured inside fp8.cached_weights(captures=True). A
// replay finds them where they were at the capture, so they stay there as long as the weight lives;
// and what an eager call inside such a context makes of the weight later is written there, so that
// the graph reads that.
//
// Whose codes they are: `weights`, one or several that are one operand, one below the other, in the
// dtype, granularity and kind of scales of `request`. Of nothing else is anything written.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/quantize/operand.h"

namespace fp8::graph_codes {

// A graph reads `operand` from now on. It stays while the first of the weights lives.
void keep(at::TensorList weights, const QuantizeRequest& request, const Operand& operand);

// The request with all that graphs read besides. Sides may share a scale, and are of one weight: a
// graph that found one of them made anew and the other one old would multiply codes by the scale of
// others.
QuantizeRequest with_kept(at::TensorList weights, QuantizeRequest request);

// Writes what was made anew where graphs read what it replaces, and makes that the operand, which
// has all of with_kept.
void renew(at::TensorList weights, const QuantizeRequest& request, Operand& operand);

}  // namespace fp8::graph_codes
