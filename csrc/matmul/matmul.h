// The matmul family inside the torch layer: what fused_linear and the public ops both call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fp8/core.h"

namespace fp8 {

// A quantized operand in a padded storage, as quantize_matrix makes it: data [>= rows, k]
// contiguous with k a multiple of 16 and zeros where there is no matrix.
struct Operand {
  const at::Tensor& data;
  const at::Tensor& scale;  // [] tensorwise, else scale_sizes(data's sizes), in quantize.h
  int64_t rows;
};

struct MatmulOptions {
  core::Granularity granularity = core::Granularity::kTensorwise;
  core::Granularity granularity_b = granularity;
  at::ScalarType out_dtype = at::kBFloat16;
  bool fast_accum = true;  // no effect on blocks
  at::Tensor bias = {};    // [b.rows], optional
  at::Tensor accumulate =
      {};                  // [a.rows, b.rows] in out_dtype, optional: the product is added to it
  bool overwrite = false;  // the product takes the place of what `accumulate` holds (beta = 0)
};

// out[i, j] = sum_k a[i, k] b[j, k] * scale_a * scale_b (+ bias[j]): [a.rows, b.rows] contiguous,
// or options.accumulate. Where b.rows * out_dtype's size is no multiple of 16 bytes, b.data (and a
// rowwise scale of b) must have pad16(b.rows) rows. With block scales both operands must have
// exactly pad16(rows) rows: what lies beyond rows is read, and not used. Extents must be positive.
at::Tensor matmul(const Operand& a, const Operand& b, const MatmulOptions& options);

// Adds an fp32 product to `into` (or writes it there) and rounds once, as cuBLASLt does.
at::Tensor store_product(const at::Tensor& into, const at::Tensor& product, bool overwrite);

}  // namespace fp8
