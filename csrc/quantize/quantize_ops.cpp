// The public quantize ops: what they accept (check_*), what they return (meta), and their CPU and
// CUDA kernels, which share everything but the device.
#include "quantize/quantize_ops.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "common/tensors.h"
#include "quantize/quantize.h"

namespace fp8 {
namespace {

using core::Granularity;
using Dtype = std::optional<at::ScalarType>;

// Returns the FP8 dtype that is meant.
at::ScalarType check_quantize(const char* op, const at::Tensor& x, Dtype dtype) {
  FP8_CHECK_HIGH_PRECISION(op, "x", x);
  FP8_CHECK_VALUE(x.dim() >= 1, "fp8::", op,
                  ": expected x of at least one dimension, got a scalar");
  const at::ScalarType format = dtype.value_or(at::kFloat8_e4m3fn);
  FP8_CHECK_TYPE(is_fp8(format), "fp8::", op, ": expected dtype float8_e4m3fn or float8_e5m2, got ",
                 format);
  return format;
}

void check_static_scale(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& scale,
                        bool power_of_two) {
  if (!scale) return;
  FP8_CHECK_VALUE(!power_of_two, "fp8::", op,
                  ": expected power_of_two=False with a given scale, which is used as it is, got "
                  "both");
  FP8_CHECK_TYPE(scale->scalar_type() == at::kFloat, "fp8::", op,
                 ": expected scale in float32, got ", scale->scalar_type());
  FP8_CHECK_VALUE(scale->sym_numel() == 1, "fp8::", op,
                  ": expected scale of one element, got shape ", scale->sym_sizes());
  FP8_CHECK_SAME_DEVICE(op, "scale", *scale, "x", x);
}

c10::SymInt leading_product(c10::SymIntArrayRef sizes) {
  c10::SymInt rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows = rows * sizes[i];
  return rows;
}

// --- real tensors ---

// A padded storage [pad16(rows), pad16(cols)] seen in x's shape.
at::Tensor in_shape_of(const at::Tensor& storage, const at::Tensor& x) {
  return storage.as_strided(x.sizes(), padded_strides<int64_t>(x.sizes()));
}

at::Tensor transposed_view(const at::Tensor& storage, const at::Tensor& x) {
  const int64_t cols = x.size(-1);
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  return storage.as_strided({cols, rows}, padded_strides<int64_t>({cols, rows}));
}

at::Tensor row_scale_view(const at::Tensor& scale, const at::Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = 1;
  return scale.narrow(0, 0, c10::multiply_integers(sizes)).view(sizes);
}

QuantizedMatrix run(const char* op, const at::Tensor& x, Dtype dtype, Granularity granularity,
                    bool transpose, bool power_of_two,
                    const std::optional<at::Tensor>& scale = std::nullopt) {
  QuantizeRequest request{.dtype = check_quantize(op, x, dtype),
                          .granularity = granularity,
                          .data_t = transpose,
                          .power_of_two = power_of_two};
  check_static_scale(op, x, scale, power_of_two);
  if (scale) request.static_scale = scale->reshape({});
  const c10::DeviceGuard guard(x.device());
  return quantize_matrix(as_matrix(x), request);
}

// --- fake tensors ---

at::Tensor meta_padded(const at::Tensor& x, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
  return at::empty_strided_symint(sizes, padded_strides<c10::SymInt>(sizes),
                                  x.options().dtype(dtype));
}

at::Tensor meta_transposed(const at::Tensor& x, at::ScalarType dtype) {
  return meta_padded(x, {x.sym_size(-1), leading_product(x.sym_sizes())}, dtype);
}

at::Tensor meta_row_scale(const at::Tensor& x) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = 1;
  return at::empty_symint(sizes, x.options().dtype(at::kFloat));
}

at::Tensor meta_scalar(const at::Tensor& x) { return at::empty({}, x.options().dtype(at::kFloat)); }

}  // namespace

namespace kernel {

std::tuple<at::Tensor, at::Tensor> quantize_tensorwise(const at::Tensor& x, Dtype dtype,
                                                       const std::optional<at::Tensor>& scale,
                                                       bool power_of_two) {
  const auto q =
      run("quantize_tensorwise", x, dtype, Granularity::kTensorwise, false, power_of_two, scale);
  return {in_shape_of(q.data, x), q.scale};
}

std::tuple<at::Tensor, at::Tensor> quantize_rowwise(const at::Tensor& x, Dtype dtype,
                                                    bool power_of_two) {
  const auto q = run("quantize_rowwise", x, dtype, Granularity::kRowwise, false, power_of_two);
  return {in_shape_of(q.data, x), row_scale_view(q.scale, x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_tensorwise_transpose(
    const at::Tensor& x, Dtype dtype, const std::optional<at::Tensor>& scale, bool power_of_two) {
  const auto q = run("quantize_tensorwise_transpose", x, dtype, Granularity::kTensorwise, true,
                     power_of_two, scale);
  return {in_shape_of(q.data, x), transposed_view(q.data_t, x), q.scale};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_rowwise_transpose(
    const at::Tensor& x, Dtype dtype, bool power_of_two) {
  const auto q =
      run("quantize_rowwise_transpose", x, dtype, Granularity::kRowwise, true, power_of_two);
  return {in_shape_of(q.data, x), transposed_view(q.data_t, x), row_scale_view(q.scale, x),
          q.scale_t.narrow(0, 0, x.size(-1)).unsqueeze(1)};
}

}  // namespace kernel

namespace meta {

std::tuple<at::Tensor, at::Tensor> quantize_tensorwise(const at::Tensor& x, Dtype dtype,
                                                       const std::optional<at::Tensor>& scale,
                                                       bool power_of_two) {
  const auto format = check_quantize("quantize_tensorwise", x, dtype);
  check_static_scale("quantize_tensorwise", x, scale, power_of_two);
  return {meta_padded(x, x.sym_sizes(), format), meta_scalar(x)};
}

std::tuple<at::Tensor, at::Tensor> quantize_rowwise(const at::Tensor& x, Dtype dtype,
                                                    bool /*power_of_two*/) {
  const auto format = check_quantize("quantize_rowwise", x, dtype);
  return {meta_padded(x, x.sym_sizes(), format), meta_row_scale(x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_tensorwise_transpose(
    const at::Tensor& x, Dtype dtype, const std::optional<at::Tensor>& scale, bool power_of_two) {
  const auto format = check_quantize("quantize_tensorwise_transpose", x, dtype);
  check_static_scale("quantize_tensorwise_transpose", x, scale, power_of_two);
  return {meta_padded(x, x.sym_sizes(), format), meta_transposed(x, format), meta_scalar(x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_rowwise_transpose(
    const at::Tensor& x, Dtype dtype, bool /*power_of_two*/) {
  const auto format = check_quantize("quantize_rowwise_transpose", x, dtype);
  const at::Tensor scale_t = at::empty_symint({x.sym_size(-1), 1}, x.options().dtype(at::kFloat));
  return {meta_padded(x, x.sym_sizes(), format), meta_transposed(x, format), meta_row_scale(x),
          scale_t};
}

}  // namespace meta

// --- dequantize ---

namespace {

// Returns the dtype that is meant.
at::ScalarType check_dequantize(const at::Tensor& data, const at::Tensor& scale, Dtype dtype) {
  FP8_CHECK_FP8("dequantize", "data", data);
  FP8_CHECK_TYPE(scale.scalar_type() == at::kFloat,
                 "fp8::dequantize: expected scale in float32, got ", scale.scalar_type());
  FP8_CHECK_SAME_DEVICE("dequantize", "scale", scale, "data", data);
  bool matches = scale.dim() == 0;
  if (scale.dim() == data.dim() && data.dim() >= 1) {
    matches = scale.sym_size(-1) == 1;
    for (int64_t i = 0; i + 1 < data.dim(); ++i) {
      matches = matches && scale.sym_size(i) == data.sym_size(i);
    }
  }
  FP8_CHECK_VALUE(
      matches,
      "fp8::dequantize: expected scale of shape [] (tensorwise) or data.shape[:-1] + [1] "
      "(rowwise), got data=",
      data.sym_sizes(), ", scale=", scale.sym_sizes());
  const at::ScalarType out = dtype.value_or(at::kBFloat16);
  FP8_CHECK_TYPE(is_high_precision(out),
                 "fp8::dequantize: expected dtype bfloat16, float16 or float32, got ", out);
  return out;
}

}  // namespace

at::Tensor kernel::dequantize(const at::Tensor& data, const at::Tensor& scale, Dtype dtype) {
  const at::ScalarType out_dtype = check_dequantize(data, scale, dtype);
  const c10::DeviceGuard guard(data.device());
  if (data.numel() == 0) return at::empty(data.sizes(), data.options().dtype(out_dtype));
  const int64_t cols = data.dim() == 0 ? 1 : data.size(-1);
  const int64_t rows = data.numel() / cols;
  const at::Tensor matrix = data.dim() == 2 ? data : data.reshape({rows, cols});
  const at::Tensor scales =
      scale.dim() == 0 ? scale.expand({rows, cols}) : scale.reshape({rows, 1}).expand({rows, cols});
  return dequantize_matrix(matrix, scales, out_dtype).view(data.sizes());
}

at::Tensor meta::dequantize(const at::Tensor& data, const at::Tensor& scale, Dtype dtype) {
  const at::ScalarType out_dtype = check_dequantize(data, scale, dtype);
  return at::empty_symint(data.sym_sizes(), data.options().dtype(out_dtype));
}

}  // namespace fp8
