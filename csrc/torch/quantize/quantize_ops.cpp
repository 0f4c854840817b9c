// The public quantize ops: what they accept (check_*), what they return (meta), and their CPU and
// CUDA kernels, which share everything but the device.
#include "torch/quantize/quantize_ops.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/tensors.h"
#include "torch/quantize/operand.h"

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
                  ": expected power_of_two=False with a static scale, which is used as it is, got "
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

Operand run(const char* op, const at::Tensor& x, Dtype dtype, Granularity granularity,
            bool transpose, bool power_of_two,
            const std::optional<at::Tensor>& scale = std::nullopt) {
  QuantizeRequest request{.dtype = check_quantize(op, x, dtype),
                          .granularity = granularity,
                          .along_rows = transpose,
                          .power_of_two = power_of_two};
  check_static_scale(op, x, scale, power_of_two);
  if (scale) request.scaling = Scaling::given(scale->reshape({}));
  const c10::DeviceGuard guard(x.device());
  return operand::make(as_matrix(x), request);
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

// As scale_view of what operand::make makes, for a matrix [rows, cols].
at::Tensor meta_block_scale(const at::Tensor& x, Granularity granularity, const c10::SymInt& rows,
                            const c10::SymInt& cols) {
  const auto storage = scale_sizes(granularity, pad16(rows), pad16(cols));
  const c10::SymInt ld = std::max(storage[1], c10::SymInt(1));
  const auto fp32 = x.options().dtype(at::kFloat);
  if (granularity == Granularity::kBlock1x128) {
    return at::empty_strided_symint({rows, storage[0]}, {1, ld}, fp32);
  }
  const c10::SymInt blocks = (cols + (core::kScaleBlock - 1)) / core::kScaleBlock;
  return at::empty_strided_symint({storage[0], blocks}, {ld, 1}, fp32);
}

at::Tensor meta_scalar(const at::Tensor& x) { return at::empty({}, x.options().dtype(at::kFloat)); }

}  // namespace

namespace kernel {
namespace {

std::tuple<at::Tensor, at::Tensor> quantize_blocks(const char* op, const at::Tensor& x, Dtype dtype,
                                                   Granularity granularity, bool power_of_two) {
  const Operand q = run(op, x, dtype, granularity, false, power_of_two);
  return {in_shape_of(q.along_cols.codes, x), scale_view(q.along_cols, x.size(-1))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blocks_transpose(
    const char* op, const at::Tensor& x, Dtype dtype, Granularity granularity, bool power_of_two) {
  const Operand q = run(op, x, dtype, granularity, true, power_of_two);
  return {in_shape_of(q.along_cols.codes, x), transposed_view(q.along_rows.codes, x),
          scale_view(q.along_cols, x.size(-1)), scale_view(q.along_rows, q.along_cols.rows)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> quantize_tensorwise(const at::Tensor& x, Dtype dtype,
                                                       const std::optional<at::Tensor>& scale,
                                                       bool power_of_two) {
  const Operand q =
      run("quantize_tensorwise", x, dtype, Granularity::kTensorwise, false, power_of_two, scale);
  return {in_shape_of(q.along_cols.codes, x), q.along_cols.scales};
}

std::tuple<at::Tensor, at::Tensor> quantize_rowwise(const at::Tensor& x, Dtype dtype,
                                                    bool power_of_two) {
  const Operand q = run("quantize_rowwise", x, dtype, Granularity::kRowwise, false, power_of_two);
  return {in_shape_of(q.along_cols.codes, x), row_scale_view(q.along_cols.scales, x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_tensorwise_transpose(
    const at::Tensor& x, Dtype dtype, const std::optional<at::Tensor>& scale, bool power_of_two) {
  const Operand q = run("quantize_tensorwise_transpose", x, dtype, Granularity::kTensorwise, true,
                        power_of_two, scale);
  return {in_shape_of(q.along_cols.codes, x), transposed_view(q.along_rows.codes, x),
          q.along_cols.scales};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_rowwise_transpose(
    const at::Tensor& x, Dtype dtype, bool power_of_two) {
  const Operand q =
      run("quantize_rowwise_transpose", x, dtype, Granularity::kRowwise, true, power_of_two);
  return {in_shape_of(q.along_cols.codes, x), transposed_view(q.along_rows.codes, x),
          row_scale_view(q.along_cols.scales, x), scale_view(q.along_rows, q.along_cols.rows)};
}

std::tuple<at::Tensor, at::Tensor> quantize_blockwise_1x128(const at::Tensor& x, Dtype dtype,
                                                            bool power_of_two) {
  return quantize_blocks("quantize_blockwise_1x128", x, dtype, Granularity::kBlock1x128,
                         power_of_two);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_1x128_transpose(
    const at::Tensor& x, Dtype dtype, bool power_of_two) {
  return quantize_blocks_transpose("quantize_blockwise_1x128_transpose", x, dtype,
                                   Granularity::kBlock1x128, power_of_two);
}

std::tuple<at::Tensor, at::Tensor> quantize_blockwise_128x128(const at::Tensor& x, Dtype dtype,
                                                              bool power_of_two) {
  return quantize_blocks("quantize_blockwise_128x128", x, dtype, Granularity::kBlock128x128,
                         power_of_two);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_128x128_transpose(
    const at::Tensor& x, Dtype dtype, bool power_of_two) {
  return quantize_blocks_transpose("quantize_blockwise_128x128_transpose", x, dtype,
                                   Granularity::kBlock128x128, power_of_two);
}

}  // namespace kernel

namespace meta {
namespace {

std::tuple<at::Tensor, at::Tensor> quantize_blocks(const char* op, const at::Tensor& x, Dtype dtype,
                                                   Granularity granularity) {
  const auto format = check_quantize(op, x, dtype);
  return {meta_padded(x, x.sym_sizes(), format),
          meta_block_scale(x, granularity, leading_product(x.sym_sizes()), x.sym_size(-1))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blocks_transpose(
    const char* op, const at::Tensor& x, Dtype dtype, Granularity granularity) {
  const auto format = check_quantize(op, x, dtype);
  const c10::SymInt rows = leading_product(x.sym_sizes());
  return {meta_padded(x, x.sym_sizes(), format), meta_transposed(x, format),
          meta_block_scale(x, granularity, rows, x.sym_size(-1)),
          meta_block_scale(x, granularity, x.sym_size(-1), rows)};
}

}  // namespace

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

std::tuple<at::Tensor, at::Tensor> quantize_blockwise_1x128(const at::Tensor& x, Dtype dtype,
                                                            bool /*power_of_two*/) {
  return quantize_blocks("quantize_blockwise_1x128", x, dtype, Granularity::kBlock1x128);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_1x128_transpose(
    const at::Tensor& x, Dtype dtype, bool /*power_of_two*/) {
  return quantize_blocks_transpose("quantize_blockwise_1x128_transpose", x, dtype,
                                   Granularity::kBlock1x128);
}

std::tuple<at::Tensor, at::Tensor> quantize_blockwise_128x128(const at::Tensor& x, Dtype dtype,
                                                              bool /*power_of_two*/) {
  return quantize_blocks("quantize_blockwise_128x128", x, dtype, Granularity::kBlock128x128);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_128x128_transpose(
    const at::Tensor& x, Dtype dtype, bool /*power_of_two*/) {
  return quantize_blocks_transpose("quantize_blockwise_128x128_transpose", x, dtype,
                                   Granularity::kBlock128x128);
}

}  // namespace meta

}  // namespace fp8
