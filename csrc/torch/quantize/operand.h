// The operand: one matrix in FP8, ready for products. Every product of the torch layer reads two
// sides of operands; where codes and scales come from (a quantization, the memory, elsewhere) is
// settled here, before.
#pragma once

#include <ATen/core/ATen_fwd.h>
#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <optional>

#include "fp8/core.h"
#include "host/launch.h"

namespace fp8 {

// What one product reads: codes that are contiguous along the contracted dimension. Undefined where
// it was not asked for.
struct Side {
  at::Tensor codes;   // [>= rows, k], k a multiple of 16, zeros beyond the matrix; grouped matmuls
                      // take a stack too, [groups, rows, k]
  at::Tensor scales;  // as granularity lays them out, see scale_sizes; tensorwise []; of a stack,
                      // or of columns in groups, [groups, rows], and [groups, ..] of squares
  core::Granularity granularity = core::Granularity::kTensorwise;
  int64_t rows = 0;  // true rows

  bool defined() const { return codes.defined(); }
};

// A matrix [rows, cols] in the two ways in which products read it.
struct Operand {
  Side along_cols;        // contracted along its columns: codes [pad16(rows), pad16(cols)]
  Side along_rows;        // along its rows: codes [pad16(cols), pad16(rows)], the transposed copy
  at::Tensor amax;        // fp32, undefined where not asked for: [], what made the scale; of a
                          // stack [groups, cols], the maxima of columns, which make the scales of
                          // along_rows
  at::Tensor column_sum;  // [cols], the same
  bool launched = false;  // kernels of this quantization are the last that were launched
};

// What makes the scale of a tensorwise quantization: core::Scaling, of tensors. A stack takes known
// maxima of columns, [groups, cols], for along_rows.
struct Scaling {
  enum class Source : uint8_t { kOwnAmax, kGiven, kKnownAmax, kHistory };
  Source source = Source::kOwnAmax;
  at::Tensor tensor;     // [] fp32: the scale, or the amax; the latter also in parts, [n], whose
                         // maximum it is; or [.., kAmaxHistorySize] int32
  int64_t row = 0;       // of a history
  bool delayed = false;  // a history makes the scale, or made it when its amax became known: what
                         // is remembered serves no request that differs in this

  static Scaling dynamic() { return {}; }
  static Scaling given(const at::Tensor& scale) { return {Source::kGiven, scale}; }
  static Scaling known_amax(const at::Tensor& amax, bool delayed) {
    return {Source::kKnownAmax, amax, 0, delayed};
  }
  static Scaling of_history(const at::Tensor& history, int64_t row) {
    return {Source::kHistory, history, row, true};
  }
};

// The same of pointers. A history is written.
inline core::Scaling core_scaling(const Scaling& scaling) {
  switch (scaling.source) {
    case Scaling::Source::kGiven:
      return core::StaticScale{scaling.tensor.const_data_ptr<float>()};
    case Scaling::Source::kKnownAmax:
      return core::KnownAmax{scaling.tensor.const_data_ptr<float>()};
    case Scaling::Source::kHistory:
      return core::Delayed{static_cast<uint32_t*>(scaling.tensor.mutable_data_ptr()) +
                           scaling.row * core::kAmaxHistorySize};
    default:
      return core::OwnAmax{};
  }
}

struct QuantizeRequest {
  at::ScalarType dtype = at::kFloat8_e4m3fn;
  core::Granularity granularity = core::Granularity::kTensorwise;
  bool along_cols = true;
  bool along_rows = false;
  bool power_of_two = false;  // scales that are computed are powers of two
  Scaling scaling = {};       // tensorwise, and known maxima of a stack
  bool keep_amax = false;     // tensorwise; of a stack where keeps_amax(stack), with along_cols
  int64_t group_rows = 0;     // rowwise with keep_amax: rows of a group, see core::QuantizeArgs
  bool pdl = false;           // see core::QuantizeArgs
  std::optional<at::ScalarType> column_sum;  // sums of x's columns in this dtype
};

namespace operand {

// Quantizes x on the CPU or a CUDA device. An empty x gives zeros and scales of 1.
Operand make(const at::Tensor& x,  // [rows, cols] from as_matrix
             const QuantizeRequest& request);

// The same of one matrix that lies in several, one below the other or side by side: the bits that
// at::cat would lead to, without the copy where the kernels can read the parts.
Operand make_joined(at::TensorList parts,  // from as_matrix, not empty, of one dtype
                    bool side_by_side, const QuantizeRequest& request);

// The same of each matrix of a stack, rowwise or in squares: codes [groups, rows, cols] and
// [groups, cols, rows], scales [groups, rows] and [groups, cols], or [groups, .., ..] as
// scale_sizes has them.
Operand make_stack(const at::Tensor& x,  // [groups, rows, cols], extents multiples of 16, stored
                                         // that way or transposed
                   const QuantizeRequest& request);

// Whether the rowwise pass that makes a stack's along_cols can leave the maxima of its columns, so
// that along_rows is made in one pass later. On fake tensors too.
bool keeps_amax(const at::Tensor& stack);  // [groups, rows, cols]

// Codes and scales that come from elsewhere. ValueError or TypeError in the name of `op`, which
// calls them `name`, where no product could read them as they are.
Side given(const char* op, const char* name,
           const at::Tensor& codes,   // [>= rows, k] FP8
           const at::Tensor& scales,  // fp32: scale_sizes(codes' sizes); [] or [1] tensorwise; or
                                      // [groups, rows] rowwise, of columns in groups
           core::Granularity granularity, int64_t rows);

}  // namespace operand

// The sizes of the scales of codes [rows, cols]: core::Granularity has the layout. Symbolic extents
// too.
template <typename Int>
c10::SmallVector<Int, 2> scale_sizes(core::Granularity granularity, const Int& rows,
                                     const Int& cols) {
  const auto blocks = [](const Int& extent) {
    return (extent + (core::kScaleBlock - 1)) / core::kScaleBlock;
  };
  if (granularity == core::Granularity::kTensorwise) return {};
  if (granularity == core::Granularity::kBlock1x128) return {blocks(cols), rows};
  if (granularity == core::Granularity::kBlock128x128) {
    return {blocks(rows), (blocks(cols) + 3) / 4 * 4};
  }
  return {rows};
}

// A side's scales as a user sees them, for a matrix of `cols` true columns: [] tensorwise, [rows,
// 1], [rows, ceil(cols / 128)] or [ceil(rows / 128), ceil(cols / 128)].
at::Tensor scale_view(const Side& side, int64_t cols);

// codes * scale with FP8 codes of any strides: each scale serves `block` rows and columns of codes.
struct ScaleBlock {
  int64_t rows = 1;
  int64_t cols = 1;
};
at::Tensor dequantize_matrix(const at::Tensor& codes,  // [rows, cols]
                             const at::Tensor& scale,  // [ceil(rows / block.rows), same of cols]
                             at::ScalarType dtype, ScaleBlock block = {});

}  // namespace fp8
