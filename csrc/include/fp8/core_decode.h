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
// bits for every m, and on every run. Codes and scales of x are those of quantize(). Sums: the
// tensor cores add 128 products of k, with 14 bits or more of each, in an order of their own; those
// sums are added in fp32.
struct DecodeArgs {
  int64_t m = 0;  // at most kMaxDecodeRows
  int64_t n = 0;
  int64_t k = 0;  // of x; the weight's rows end with zeros up to a multiple of 16
  // x as it is, which the launch quantizes (DecodeInput::kValues) ...
  const void* x = nullptr;           // [m, k], any alignment of whole elements
  Dtype x_dtype = Dtype::kBFloat16;  // and of bias and y
  int64_t ldx = 0;
  bool power_of_two = false;           // of scales that are computed
  const float* input_scale = nullptr;  // one float: static, with kTensorwise
  // ... or what quantize() made of it (DecodeInput::kCodes): e4m3 [>= m, ld_codes], zeros from
  // column k on, 16-byte aligned, with scales as Granularity lays them out for scale_rows rows, an
  // even number.
  const void* x_codes = nullptr;
  int64_t ld_codes = 0;  // a multiple of 16
  const float* x_scale = nullptr;
  int64_t scale_rows = 0;
  Granularity granularity = Granularity::kRowwise;  // of x: kTensorwise (a scale that is given),
                                                    // kRowwise or kBlock1x128
  const void* weight = nullptr;                     // [n, ldw] e4m3, 16-byte aligned
  int64_t ldw = 0;                                  // a multiple of 16
  // Element (n / 128, k / 128) with kBlock1x128, else (n, 0): strides in elements, 0 where one
  // scale serves all.
  const float* weight_scale = nullptr;
  int64_t weight_scale_row_stride = 0;
  int64_t weight_scale_col_stride = 0;
  const void* bias = nullptr;  // [n], optional
  void* y = nullptr;           // [m, n] contiguous
  // The launch before this one on the stream, and those that may still run beside it, do not write
  // the weight or its scales: both may be read while they end. Nothing else is.
  bool pdl = false;
  int device = -1;  // as in QuantizeArgs
};

// What decode() takes of x. kNone: nothing, because the device is not of compute capability 9.0,
// the extents do not suit, or matmul is as fast. A function of the extents, the granularity and the
// device; pointers and strides are not looked at.
enum class DecodeInput : uint8_t { kNone, kValues, kCodes };
DecodeInput decode_input(const DecodeArgs& args);

// One launch. args has what decode_input said.
void decode(const DecodeArgs& args, Stream stream);

}  // namespace fp8::core
