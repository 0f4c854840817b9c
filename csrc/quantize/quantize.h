// The quantize family inside the torch layer: what fused_linear and the public ops both call.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>

#include "common/launch.h"
#include "fp8/core.h"

namespace fp8 {

// What makes the scale of a tensorwise quantization: core::Scaling, of tensors.
struct Scaling {
  enum class Source : uint8_t { kOwnAmax, kGiven, kKnownAmax, kHistory };
  Source source = Source::kOwnAmax;
  at::Tensor tensor;     // [] fp32: the scale, or the amax; or [.., kAmaxHistorySize] int32
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

struct QuantizeRequest {
  at::ScalarType dtype = at::kFloat8_e4m3fn;
  core::Granularity granularity = core::Granularity::kTensorwise;
  bool data = true;
  bool data_t = false;
  bool power_of_two = false;  // scales that are computed are powers of two
  Scaling scaling;            // tensorwise
  bool keep_amax = false;
  bool overlaps_previous = false;            // see core::QuantizeArgs
  std::optional<at::ScalarType> column_sum;  // sums of x's columns in this dtype
};

// Padded storages, ready for a matmul: zeros beyond the matrix. Undefined where not asked for.
struct QuantizedMatrix {
  at::Tensor data;        // [pad16(rows), pad16(cols)]
  at::Tensor data_t;      // [pad16(cols), pad16(rows)]
  at::Tensor scale;       // of data: [] tensorwise, else scale_sizes(data's sizes)
  at::Tensor scale_t;     // of data_t; tensorwise undefined
  at::Tensor amax;        // [], that which made the scale
  at::Tensor column_sum;  // [cols]
  bool launched = false;  // kernels of this quantization are the last that were launched
};

// The storage of the scales of a storage [rows, cols], not tensorwise: core::Granularity has it.
// Symbolic extents too.
template <typename Int>
c10::SmallVector<Int, 2> scale_sizes(core::Granularity granularity, const Int& rows,
                                     const Int& cols) {
  const auto blocks = [](const Int& extent) {
    return (extent + (core::kScaleBlock - 1)) / core::kScaleBlock;
  };
  if (granularity == core::Granularity::kBlock1x128) return {blocks(cols), rows};
  if (granularity == core::Granularity::kBlock128x128) {
    return {blocks(rows), (blocks(cols) + 3) / 4 * 4};
  }
  return {rows};
}

// A storage of scales as a user sees it, for a matrix [rows, cols]: [] tensorwise, [rows, 1],
// [rows, ceil(cols / 128)] or [ceil(rows / 128), ceil(cols / 128)].
at::Tensor scale_view(const at::Tensor& scale, core::Granularity granularity, int64_t rows,
                      int64_t cols);

// x: [rows, cols] from as_matrix, on the CPU or a CUDA device. An empty x gives zeros and scales
// of 1.
QuantizedMatrix quantize_matrix(const at::Tensor& x, const QuantizeRequest& request);

// data * scale with fp8 data of any strides: each scale serves `block` rows and columns of data.
struct ScaleBlock {
  int64_t rows = 1;
  int64_t cols = 1;
};
at::Tensor dequantize_matrix(const at::Tensor& data,   // [rows, cols]
                             const at::Tensor& scale,  // [ceil(rows / block.rows), same of cols]
                             at::ScalarType dtype, ScaleBlock block = {});

}  // namespace fp8
