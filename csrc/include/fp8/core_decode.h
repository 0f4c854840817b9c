// fp8/core_decode.h: the product of few rows with an FP8 weight, bound by the weight's bytes. The
// promises of fp8/core.h hold: no device memory is allocated, nothing synchronizes, no torch
// header. Not installed.
#pragma once

#include "fp8/core.h"

namespace fp8::core {

inline constexpr int64_t kMaxDecodeRows = 64;

// y[m, n] = sum_k x[m, k] weight[n, k] * scale_x * scale_weight (+ bias[n]), rounded once to
// x_dtype.
//
// A row of y is a function of that row of x, the weight and the extents n and k: it has the same
// bits for every m that is taken, and on every run. Codes and scales of x are those of quantize().
// Sums: the tensor cores add the products of 256 columns, of 128 with blocks, with 14 bits; those
// sums are added in fp32.
struct DecodeArgs {
  int64_t m = 0;  // at most kMaxDecodeRows
  int64_t n = 0;
  int64_t k = 0;
  const void* x = nullptr;           // [m, k], contiguous columns, any alignment of whole elements
  Dtype x_dtype = Dtype::kBFloat16;  // and of bias and y
  int64_t ldx = 0;
  Granularity granularity = Granularity::kRowwise;  // of x: kTensorwise, kRowwise or kBlock1x128
  const float* input_scale = nullptr;  // one float, with kTensorwise: a scale that is given
  bool power_of_two = false;           // of scales that are computed
  const void* weight = nullptr;        // [n, ldw] e4m3, 16-byte aligned
  int64_t ldw = 0;                     // a multiple of 16, zeros from column k on
  // Of element (i, j) at i * row_stride, with kBlock1x128 at i / 128 * row_stride + j / 128 *
  // col_stride.
  const float* weight_scale = nullptr;
  int64_t weight_scale_row_stride = 0;
  int64_t weight_scale_col_stride = 0;
  const void* bias = nullptr;  // [n], optional
  void* y = nullptr;           // [m, n] contiguous
  void* workspace = nullptr;   // decode_workspace_bytes(args) bytes, 16-byte aligned
  // The launch before this one on the stream, and those that may still run beside it, do not write
  // the weight: it may be read while they end. Nothing else is. No effect with a workspace.
  bool pdl = false;
  int device = -1;  // as in QuantizeArgs
};

// Whether decode() takes these extents on this device: one of compute capability 9.0, where it is
// faster than quantize() and a matmul. If it takes some m it takes all that are smaller: up to 64
// rows, up to 32 where x and the weight have one scale each, or have scales of blocks with more
// than 2^25 elements of the weight (host/decode_plan.h). Looked at are m, n, k, granularity and
// whether weight_scale_row_stride is 0.
bool suits_decode(const DecodeArgs& args);

// 0 where every block of the one launch quantizes x for itself. Of more rows a launch before makes
// the codes, into the workspace; the two overlap, and the second reads nothing but the weight
// before the first has ended.
size_t decode_workspace_bytes(const DecodeArgs& args);

void decode(const DecodeArgs& args, Stream stream);

}  // namespace fp8::core
