// Delayed scaling: the histories of amax that a layer's quantizations leave and take.
//
// An operator knows a layer by its weight, so that is what the histories hang on: by the memory of
// the weight tensor, one for x, one for the weight, one for dy, for each stream that the layer runs
// on, until that memory is gone. They are no part of a module's state: after a start from a
// checkpoint the first calls scale dynamically, as at the beginning.
//
// A history makes a scale better or worse by a bounded factor and never wrong (fp8/core.h), so that
// it does no harm where it is that of other data.
//
// null, which is dynamic scaling, where a history would be that of nothing lasting, or would stand
// still:
//   - a weight that is the result of an operator (a parametrization, a cast by autocast): the next
//     step has another one. A cast without a graph, of a frozen weight, does not come here:
//     registration/autocast.cpp takes `tensorwise`
//   - the capture of a CUDA graph, whose replays no host counts
//   - dy, where the backward has another weight than the forward (saved-tensor hooks): no forward
//     will come with that one
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "quantize/operand.h"

namespace fp8::delayed {

enum class Role : uint8_t { kInput, kWeight, kGradOutput };

std::shared_ptr<AmaxHistory> history(const at::Tensor& weight, Role role);

// Whether this thread is in the middle of a backward: a forward that runs then is a recomputation
// (activation checkpointing), which takes the scales of the forward that it repeats.
bool in_backward();

// The same, of the kind that repeats a forward under no_grad (use_reentrant=True).
bool in_reentrant_backward();

}  // namespace fp8::delayed
