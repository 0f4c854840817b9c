// fp8/core_norm.h: RMSNorm and LayerNorm over rows, forward and backward, without LibTorch. The
// promises of fp8/core.h hold: no device memory is allocated, nothing synchronizes, no torch
// header.
//
// Everything is computed in fp32 and rounded where eager PyTorch rounds (host/norm.h has the
// formulas). Sums over a row are added in an order that depends on the number of columns alone, so
// a row's results do not depend on the other rows; the CPU's passes have the same order and the
// same bits.
#pragma once

#include "fp8/core.h"

namespace fp8::core {

// xhat = x / sqrt(mean(x^2) + eps), T the dtype of x:
//   kScaleThenRound   y = T(w * xhat)
//   kRoundThenScale   y = T(w * T(xhat))
//   kScaleByOnePlus   y = T((1 + w) * xhat)
// kLayer: xhat = (x - mean(x)) / sqrt(var(x) + eps), y = T(w * xhat + b).
enum class NormForm : uint8_t { kScaleThenRound, kRoundThenScale, kScaleByOnePlus, kLayer };

// Where the rows of a tensor [.., n1, n2, cols] lie, whose columns are contiguous: row (i * n1 + j)
// * n2 + k is i * stride0 + j * stride1 + k * stride2 elements from the first. A matrix has n1 = n2
// = 1, and stride0 between its rows.
struct NormRows {
  int64_t n1 = 1;
  int64_t n2 = 1;
  int64_t stride0 = 0;
  int64_t stride1 = 0;
  int64_t stride2 = 0;
};

inline constexpr int64_t kMaxNormExtent = int64_t{1} << 30;

struct NormArgs {
  NormForm form = NormForm::kScaleThenRound;
  Dtype dtype = Dtype::kBFloat16;  // of x and y, dy and dx
  int64_t rows = 0;                // both below kMaxNormExtent
  int64_t cols = 0;
  const void* weight = nullptr;           // [cols], or nullptr for ones
  const void* bias = nullptr;             // [cols], of kLayer, or nullptr for zeros
  Dtype weight_dtype = Dtype::kBFloat16;  // of weight and bias: dtype, or float32
};

struct NormForwardArgs {
  NormArgs norm;
  const void* x = nullptr;
  NormRows x_rows;
  // Not of kLayer: what is normed is T(x + residual), and it is written too.
  const void* residual = nullptr;
  NormRows residual_rows;
  float eps = 0.0F;
  void* y = nullptr;      // [rows, cols]
  void* sum = nullptr;    // [rows, cols], with residual
  float* mean = nullptr;  // [rows], of kLayer
  float* rstd = nullptr;  // [rows]
  // max |y| in parts, whose maximum is that of y: [norm_amax_parts(args)], optional. It costs no
  // launch, and saves quantize_normed one pass over y.
  float* y_amax = nullptr;
};
void norm_forward(const NormForwardArgs& args, Stream stream);

// How many parts: at most 16 to a multiprocessor. 0 where they are not left: elements of 32 bits,
// rows that do not fit into a block. Depends on extents, dtype, form and whether there is a
// residual.
int64_t norm_amax_parts(const NormForwardArgs& args);

// quantize(args) where args.scaling is a KnownAmax of `parts` numbers, whose maximum is the amax.
void quantize_normed(const QuantizeArgs& args, int64_t parts, Stream stream);

// From dy the gradients of x, weight and bias, those that have a place to go. `add` is added to dx:
// T(add + T(dx)), as where a residual stream's gradient joins.
struct NormBackwardArgs {
  NormArgs norm;
  const void* dy = nullptr;
  NormRows dy_rows;
  const void* x = nullptr;
  NormRows x_rows;
  const void* add = nullptr;  // optional
  NormRows add_rows;
  const float* mean = nullptr;  // [rows], of kLayer
  const float* rstd = nullptr;  // [rows]
  void* dx = nullptr;           // [rows, cols]
  void* dweight = nullptr;      // [cols] in weight_dtype
  void* dbias = nullptr;        // the same; of kLayer
  float* workspace = nullptr;   // norm_workspace_floats(args) on the device, any content
};
int64_t norm_workspace_floats(const NormBackwardArgs& args);
void norm_backward(const NormBackwardArgs& args, Stream stream);

}  // namespace fp8::core
