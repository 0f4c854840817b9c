// The public matmul ops: what they accept, what they return, and how foreign operands become padded
// ones.
#include "matmul/scaled_mm.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "common/tensors.h"
#include "matmul/matmul.h"

namespace fp8 {
namespace {

using core::Granularity;

Granularity check_operands(const char* op, const at::Tensor& a, const at::Tensor& b,
                           const at::Tensor& scale_a, const at::Tensor& scale_b) {
  FP8_CHECK_FP8(op, "a", a);
  FP8_CHECK_FP8(op, "b", b);
  FP8_CHECK_VALUE(a.dim() == 2 && b.dim() == 2, "fp8::", op,
                  ": expected matrices a=[M, K] and b=[N, K], got a=", a.sym_sizes(),
                  ", b=", b.sym_sizes());
  FP8_CHECK_VALUE(a.sym_size(1) == b.sym_size(1), "fp8::", op,
                  ": a and b must share K, got a=", a.sym_sizes(), ", b=", b.sym_sizes(),
                  " (b is [N, K])");
  FP8_CHECK_TYPE(scale_a.scalar_type() == at::kFloat && scale_b.scalar_type() == at::kFloat,
                 "fp8::", op, ": expected scales in float32, got scale_a ", scale_a.scalar_type(),
                 ", scale_b ", scale_b.scalar_type());
  FP8_CHECK_SAME_DEVICE(op, "b", b, "a", a);
  FP8_CHECK_SAME_DEVICE(op, "scale_a", scale_a, "a", a);
  FP8_CHECK_SAME_DEVICE(op, "scale_b", scale_b, "a", a);
  const auto tensorwise = [](const at::Tensor& scale) {
    return scale.dim() == 0 || (scale.dim() == 1 && scale.sym_size(0) == 1);
  };
  const auto rowwise = [](const at::Tensor& scale, const at::Tensor& operand) {
    return scale.dim() == 2 && scale.sym_size(0) == operand.sym_size(0) && scale.sym_size(1) == 1;
  };
  if (tensorwise(scale_a) && tensorwise(scale_b)) return Granularity::kTensorwise;
  FP8_CHECK_VALUE(rowwise(scale_a, a) && rowwise(scale_b, b), "fp8::", op,
                  ": expected scale_a and scale_b both [] (tensorwise), or [M, 1] and [N, 1] "
                  "(rowwise), got a=",
                  a.sym_sizes(), ", b=", b.sym_sizes(), ", scale_a=", scale_a.sym_sizes(),
                  ", scale_b=", scale_b.sym_sizes());
  return Granularity::kRowwise;
}

struct ScaledMmContract {
  Granularity granularity;
  at::ScalarType out_dtype;
};

ScaledMmContract check_scaled_mm(const at::Tensor& a, const at::Tensor& b,
                                 const at::Tensor& scale_a, const at::Tensor& scale_b,
                                 const std::optional<at::Tensor>& bias,
                                 std::optional<at::ScalarType> out_dtype) {
  const Granularity granularity = check_operands("scaled_mm", a, b, scale_a, scale_b);
  const at::ScalarType out = out_dtype.value_or(at::kBFloat16);
  FP8_CHECK_TYPE(is_high_precision(out),
                 "fp8::scaled_mm: expected out_dtype bfloat16, float16 or float32, got ", out);
  if (bias) {
    const bool dtype_ok =
        bias->scalar_type() == out || (out == at::kFloat && bias->scalar_type() == at::kBFloat16);
    FP8_CHECK_TYPE(dtype_ok, "fp8::scaled_mm: expected bias in out_dtype ", out,
                   " (or bfloat16 for float32), got ", bias->scalar_type());
    FP8_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == b.sym_size(0),
                    "fp8::scaled_mm: expected bias of shape [N] = [", b.sym_size(0), "], got ",
                    bias->sym_sizes());
    FP8_CHECK_SAME_DEVICE("scaled_mm", "bias", *bias, "a", a);
  }
  return {granularity, out};
}

void check_accumulate(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  FP8_CHECK_TYPE(is_high_precision(out.scalar_type()),
                 "fp8::scaled_mm_accumulate_: expected out in bfloat16, float16 or float32, got ",
                 out.scalar_type());
  FP8_CHECK_VALUE(
      out.dim() == 2 && out.sym_size(0) == a.sym_size(0) && out.sym_size(1) == b.sym_size(0),
      "fp8::scaled_mm_accumulate_: expected out of shape [M, N] = [", a.sym_size(0), ", ",
      b.sym_size(0), "], got ", out.sym_sizes());
  FP8_CHECK_SAME_DEVICE("scaled_mm_accumulate_", "out", out, "a", a);
}

// What a caller brings may be strided, misaligned or of any K: then it is copied into a padded
// storage. Whether the memory after a row holds zeros cannot be known, so it is never read.
at::Tensor padded_operand(const at::Tensor& x, bool pad_rows) {
  const int64_t rows = pad_rows ? pad16(x.size(0)) : x.size(0);
  const int64_t k = pad16(x.size(1));
  const bool row_stride_ok = x.size(0) == 1 || (x.stride(0) % 16 == 0 && x.stride(0) >= x.size(1));
  const bool usable = x.size(1) == k && rows == x.size(0) && (x.stride(1) == 1) && row_stride_ok &&
                      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  if (usable && x.size(0) > 1) return x;
  if (usable) return x.as_strided({1, k}, {k, 1});
  at::Tensor storage = at::zeros({rows, k}, x.options().dtype(at::kByte));
  storage.narrow(0, 0, x.size(0)).narrow(1, 0, x.size(1)).copy_(x.view(at::kByte));
  return storage.view(x.scalar_type());
}

at::Tensor padded_scale(const at::Tensor& scale, Granularity granularity, int64_t rows) {
  const at::Tensor flat = granularity == Granularity::kTensorwise
                              ? scale.reshape({})
                              : scale.reshape({-1}).contiguous();
  if (granularity == Granularity::kRowwise && rows > flat.size(0)) {
    return at::constant_pad_nd(flat, {0, rows - flat.size(0)});
  }
  const bool aligned = reinterpret_cast<uintptr_t>(flat.const_data_ptr()) % 16 == 0;
  return aligned ? flat : flat.clone();
}

at::Tensor run(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
               const at::Tensor& scale_b, const MatmulOptions& options) {
  // Rows of out that are no multiple of 16 bytes need room for padded rows of b.
  const bool pad_rows =
      b.size(0) * static_cast<int64_t>(c10::elementSize(options.out_dtype)) % 16 != 0;
  const at::Tensor data_a = padded_operand(a, false);
  const at::Tensor data_b = padded_operand(b, pad_rows);
  const at::Tensor flat_a = padded_scale(scale_a, options.granularity, a.size(0));
  const at::Tensor flat_b = padded_scale(scale_b, options.granularity, data_b.size(0));
  return matmul({data_a, flat_a, a.size(0)}, {data_b, flat_b, b.size(0)}, options);
}

}  // namespace

at::Tensor kernel::scaled_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                             const at::Tensor& scale_b, const std::optional<at::Tensor>& bias,
                             std::optional<at::ScalarType> out_dtype, bool fast_accum) {
  const ScaledMmContract contract = check_scaled_mm(a, b, scale_a, scale_b, bias, out_dtype);
  const c10::DeviceGuard guard(a.device());
  if (a.size(0) == 0 || b.size(0) == 0 || a.size(1) == 0) {
    at::Tensor out = at::zeros({a.size(0), b.size(0)}, a.options().dtype(contract.out_dtype));
    return bias ? out.add_(*bias) : out;
  }
  return run(a, b, scale_a, scale_b,
             {.granularity = contract.granularity,
              .out_dtype = contract.out_dtype,
              .fast_accum = fast_accum,
              .bias = bias.value_or(at::Tensor())});
}

at::Tensor meta::scaled_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                           const at::Tensor& scale_b, const std::optional<at::Tensor>& bias,
                           std::optional<at::ScalarType> out_dtype, bool) {
  const ScaledMmContract contract = check_scaled_mm(a, b, scale_a, scale_b, bias, out_dtype);
  return at::empty_symint({a.sym_size(0), b.sym_size(0)}, a.options().dtype(contract.out_dtype));
}

at::Tensor& kernel::scaled_mm_accumulate_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                                          const at::Tensor& scale_a, const at::Tensor& scale_b,
                                          bool fast_accum) {
  const Granularity granularity = check_operands("scaled_mm_accumulate_", a, b, scale_a, scale_b);
  check_accumulate(out, a, b);
  if (out.numel() == 0 || a.size(1) == 0) return out;
  const c10::DeviceGuard guard(a.device());
  run(a, b, scale_a, scale_b,
      {.granularity = granularity,
       .out_dtype = out.scalar_type(),
       .fast_accum = fast_accum,
       .accumulate = out});
  return out;
}

at::Tensor& meta::scaled_mm_accumulate_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                                        const at::Tensor& scale_a, const at::Tensor& scale_b,
                                        bool) {
  check_operands("scaled_mm_accumulate_", a, b, scale_a, scale_b);
  check_accumulate(out, a, b);
  return out;
}

at::Tensor kernel::_scaled_mm_accumulate(const at::Tensor& out, const at::Tensor& a,
                                         const at::Tensor& b, const at::Tensor& scale_a,
                                         const at::Tensor& scale_b, bool fast_accum) {
  at::Tensor sum = out.clone();
  return scaled_mm_accumulate_(sum, a, b, scale_a, scale_b, fast_accum);
}

at::Tensor meta::_scaled_mm_accumulate(const at::Tensor& out, const at::Tensor& a,
                                       const at::Tensor& b, const at::Tensor& scale_a,
                                       const at::Tensor& scale_b, bool) {
  check_operands("scaled_mm_accumulate_", a, b, scale_a, scale_b);
  check_accumulate(out, a, b);
  return at::empty_like(out);
}

}  // namespace fp8
