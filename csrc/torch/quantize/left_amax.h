// Maxima that norms leave of what they write, so that a tensorwise quantization of it is one pass
// in place of two, with the same bits.
//
// They serve as what is remembered of inputs does (memory.h): eager calls under autograd, the
// tensor itself, not written since, the same stream and graph capture, until the next backward.
//
// A norm leaves them where it pays, which each norm learns, by the tensor of its weight: the first
// quantization that looks for them turns them on, eight outputs in a row of which nobody asked turn
// them off (an output may go unread now and then, as in a recomputation that ends early). Before
// the first such quantization of the process, and in a model of other recipes so for ever, nothing
// is noted either. What was learned decides about a pass, never about a bit.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "torch/quantize/remembered.h"

namespace fp8::memory {

// One call of a norm, that is about to write y.
class NormCall {
 public:
  NormCall(const std::optional<at::Tensor>& weight, int64_t cols);

  bool leaves_amax() const { return leaves_; }
  // After the launch. amax: as core::NormForwardArgs::y_amax, undefined where it was not left.
  void wrote(const at::Tensor& y, const at::Tensor& amax) const;

 private:
  uintptr_t norm_;  // 0: nothing is noted
  bool leaves_;
};

// fp32, in parts whose maximum is that of |x|; undefined if there is none. place: place_of(x).
at::Tensor left_amax(const at::Tensor& x, const Place& place);

// Those of tensors that are gone; all of them.
void drop_gone_amaxes();
void drop_amaxes();

}  // namespace fp8::memory
