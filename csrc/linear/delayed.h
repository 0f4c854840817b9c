// Delayed scaling: the histories of amax that a layer's quantizations leave and take.
//
// An operator knows a layer by its weight, so that is what the histories hang on: one for x, one
// for the weight, one for dy, each of 18 floats on the weight's device, until the weight is gone.
// They are no part of a module's state: after a start from a checkpoint the first calls scale
// dynamically, as at the beginning.
//
// null, which is dynamic scaling, where a history would be that of nothing lasting, or would stand
// still:
//   - a weight that is the result of an operator (a parametrization, a cast by autocast): the next
//     step has another one. A cast without a graph, of a frozen weight, does not come here:
//     registration/autocast.cpp takes `tensorwise`
//   - the capture of a CUDA graph, whose replays no host counts
//   - dy, where the backward has another tensor than the forward (saved-tensor hooks): no forward
//     will come with that one
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "quantize/quantize.h"

namespace fp8::delayed {

enum class Operand : uint8_t { kInput, kWeight, kGradOutput };

// Lives as long as the weight.
AmaxHistory* history(const at::Tensor& weight, Operand operand);

}  // namespace fp8::delayed
