// fp8/core_rope.h: rotary position embedding of q and k, forward and backward in one pass, without
// LibTorch. The promises of fp8/core.h hold: no device memory is allocated, nothing synchronizes,
// no torch header.
//
// Products and sums are fp32 operations, rounded where eager PyTorch rounds (host/rope.h has the
// formula), so the results have its bits; the CPU's pass has the same.
#pragma once

#include "fp8/core.h"

namespace fp8::core {

// Which elements of a row are a pair, of `rotary` that are rotated. i < rotary / 2:
//   kHalves               i and i + rotary / 2
//   kInterleaved          2 i and 2 i + 1
//   kInterleavedToHalves  read as kInterleaved, written as kHalves
enum class RopeLayout : uint8_t { kHalves, kInterleaved, kInterleavedToHalves };

// q or k: [n0, n1, n2, cols], columns contiguous. Strides are in elements; those of cos and sin are
// 0 where the dimension does not change them.
struct RopeTensor {
  const void* x = nullptr;  // none: no such tensor
  void* y = nullptr;
  int64_t sizes[3] = {1, 1, 1};
  int64_t x_strides[3] = {0, 0, 0};
  int64_t y_strides[3] = {0, 0, 0};
  int64_t cos_strides[3] = {0, 0, 0};
  int64_t sin_strides[3] = {0, 0, 0};
};

// Each pair (a, b) is rotated: (a cos - b sin, b cos + a sin). Columns from `rotary` on are copied.
struct RopeArgs {
  Dtype x_dtype = Dtype::kBFloat16;
  Dtype y_dtype = Dtype::kBFloat16;    // one of both is float32 if they differ
  Dtype cos_dtype = Dtype::kBFloat16;  // that of x or y, or float32
  RopeLayout layout = RopeLayout::kHalves;
  int64_t cols = 0;
  int64_t rotary = 0;             // even, at most cols
  bool per_pair = false;          // a row of cos has rotary / 2 columns; else rotary, which lie as
                                  // the forward's x does
  bool transposed = false;        // the backward: x is the gradient of the result, y that of x
  bool rounds_products = true;    // to y_dtype, before they are added
  bool keeps_minus_zero = false;  // of the backward: eager adds zeros, after which no -0 is left
  const void* cos = nullptr;      // columns contiguous
  const void* sin = nullptr;
  RopeTensor tensors[2];  // q, k
};
void rope(const RopeArgs& args, Stream stream);

}  // namespace fp8::core
