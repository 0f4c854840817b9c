// The quantize family inside the torch layer: what fused_linear and the public ops both call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fp8/core.h"

namespace fp8 {

struct QuantizeRequest {
  at::ScalarType dtype = at::kFloat8_e4m3fn;
  core::Granularity granularity = core::Granularity::kTensorwise;
  bool data = true;
  bool data_t = false;
  bool power_of_two = false;  // scales that are computed are powers of two
  at::Tensor static_scale;    // [] fp32, tensorwise: a given scale
  at::Tensor amax;            // [] fp32, tensorwise: amax of an earlier call on the same x
  bool keep_amax = false;
  bool overlaps_previous = false;            // see core::QuantizeArgs
  std::optional<at::ScalarType> column_sum;  // sums of x's columns in this dtype
};

// Padded storages, ready for a matmul: zeros beyond the matrix. Undefined where not asked for.
struct QuantizedMatrix {
  at::Tensor data;        // [pad16(rows), pad16(cols)]
  at::Tensor data_t;      // [pad16(cols), pad16(rows)]
  at::Tensor scale;       // [] tensorwise, [pad16(rows)] rowwise
  at::Tensor scale_t;     // [pad16(cols)], rowwise
  at::Tensor amax;        // []
  at::Tensor column_sum;  // [cols]
  bool launched = false;  // kernels of this quantization are the last that were launched
};

// x: [rows, cols] from as_matrix, on the CPU or a CUDA device. An empty x gives zeros and scales
// of 1.
QuantizedMatrix quantize_matrix(const at::Tensor& x, const QuantizeRequest& request);

// data * scale with fp8 data of any strides and a broadcastable scale, both as matrices.
at::Tensor dequantize_matrix(const at::Tensor& data,   // [rows, cols]
                             const at::Tensor& scale,  // [rows, cols], expanded
                             at::ScalarType dtype);

}  // namespace fp8
