// The matmul family inside the torch layer: what fused_linear and the public ops both call.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/quantize/operand.h"

namespace fp8 {

// How a product is made, and where it goes.
struct Output {
  at::ScalarType dtype = at::kBFloat16;
  bool fast_accum = true;        // no effect on blocks
  at::Tensor bias = {};          // [b.rows], optional
  at::Tensor into = {};          // [a.rows, b.rows] in dtype, optional: the product is added to it
  bool overwrite = false;        // the product takes the place of what `into` holds (beta = 0)
  bool batch_invariant = false;  // a row must not depend on the others; not with `into`
};

// out[i, j] = sum_k a[i, k] b[j, k] * scale_a * scale_b (+ bias[j]): [a.rows, b.rows] contiguous,
// or output.into. Where b.rows * dtype's size is no multiple of 16 bytes, b.codes (and a rowwise
// scale of b) must have pad16(b.rows) rows. With block scales both sides must have exactly
// pad16(rows) rows: what lies beyond rows is read, and not used. Extents must be positive.
at::Tensor matmul(const Side& a, const Side& b, const Output& output);

// Adds an fp32 product to `into` (or writes it there) and rounds once, as cuBLASLt does.
at::Tensor store_product(const at::Tensor& into, const at::Tensor& product, bool overwrite);

}  // namespace fp8
