// Codes of weights that CUDA graphs read, captured inside fp8.cached_weights(captures=True). A
// replay finds them where they were at the capture, so they stay there as long as the weight lives;
// and what an eager call inside such a context makes of the weight later is written there, so that
// the graph reads that.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/quantize/operand.h"

namespace fp8::graph_codes {

// A graph reads `operand` from now on, which is of `weight`, or of it and the weights below it.
void keep(const at::Tensor& weight, bool joined, const Operand& operand);

// Writes what was made anew where graphs read what it replaces, and makes that the operand.
void renew(const at::Tensor& weight, bool joined, Operand& operand);

}  // namespace fp8::graph_codes
