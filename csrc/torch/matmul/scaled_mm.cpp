// The public matmul ops: what they accept, what they return, and how foreign operands become padded
// ones.
#include "torch/matmul/scaled_mm.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "host/formats.h"
#include "torch/common/tensors.h"
#include "torch/matmul/matmul.h"

namespace fp8 {
namespace {

using core::Granularity;

struct Granularities {
  Granularity a;
  Granularity b;
};

// What shapes say about scales that are not tensorwise. Where two readings are possible they mean
// the same: up to K = 128, a block of a row is the row, and of one row a square is no more than
// that.
bool is_rowwise(const at::Tensor& scale, const at::Tensor& operand) {
  return scale.dim() == 2 && scale.sym_size(0) == operand.sym_size(0) && scale.sym_size(1) == 1;
}

std::optional<Granularity> blocks_of(const at::Tensor& scale, const at::Tensor& operand) {
  const auto blocks = [](const c10::SymInt& extent) {
    return (extent + (core::kScaleBlock - 1)) / core::kScaleBlock;
  };
  if (scale.dim() != 2 || scale.sym_size(1) != blocks(operand.sym_size(1))) return std::nullopt;
  if (scale.sym_size(0) == operand.sym_size(0)) return Granularity::kBlock1x128;
  if (scale.sym_size(0) == blocks(operand.sym_size(0))) return Granularity::kBlock128x128;
  return std::nullopt;
}

Granularities check_operands(const char* op, const at::Tensor& a, const at::Tensor& b,
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
  if (tensorwise(scale_a) && tensorwise(scale_b)) {
    return {Granularity::kTensorwise, Granularity::kTensorwise};
  }
  if (is_rowwise(scale_a, a) && is_rowwise(scale_b, b)) {
    return {Granularity::kRowwise, Granularity::kRowwise};
  }
  const auto of_a = blocks_of(scale_a, a);
  const auto of_b = blocks_of(scale_b, b);
  FP8_CHECK_VALUE(of_a && of_b, "fp8::", op,
                  ": expected scale_a and scale_b both [] (tensorwise), [M, 1] and [N, 1] "
                  "(rowwise), or each in blocks: [M, ceil(K / 128)] or [ceil(M / 128), ceil(K / "
                  "128)], and the same with N; got a=",
                  a.sym_sizes(), ", b=", b.sym_sizes(), ", scale_a=", scale_a.sym_sizes(),
                  ", scale_b=", scale_b.sym_sizes());
  return {*of_a, *of_b};
}

struct ScaledMmContract {
  Granularities granularities;
  at::ScalarType out_dtype;
};

ScaledMmContract check_scaled_mm(const at::Tensor& a, const at::Tensor& b,
                                 const at::Tensor& scale_a, const at::Tensor& scale_b,
                                 const std::optional<at::Tensor>& bias,
                                 std::optional<at::ScalarType> out_dtype) {
  const Granularities granularities = check_operands("scaled_mm", a, b, scale_a, scale_b);
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
  return {granularities, out};
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

// `t` seen as a contiguous-column matrix that may be larger, if its storage has the memory for it.
bool reaches(const at::Tensor& t, int64_t rows, int64_t ld, int64_t cols) {
  const int64_t elements = t.storage_offset() + (rows - 1) * ld + cols;
  return static_cast<int64_t>(t.storage().nbytes()) >=
         elements * static_cast<int64_t>(t.element_size());
}

// How many rows an operand needs: as they are; padded with zeros; or padded by whatever lies there,
// which is read and then not used.
enum class Rows : uint8_t { kAsIs, kZeros, kAny };

// What a caller brings may be strided, misaligned or of any K: then it is copied into a padded
// storage. Whether the memory after a row holds zeros cannot be known, so it is never read.
at::Tensor padded_operand(const at::Tensor& x, Rows padding) {
  const int64_t rows = padding == Rows::kAsIs ? x.size(0) : pad16(x.size(0));
  const int64_t k = pad16(x.size(1));
  const int64_t ld = x.size(0) == 1 ? k : x.stride(0);
  const bool usable = x.size(1) == k && (x.stride(1) == 1) && ld % 16 == 0 && ld >= k &&
                      on_16_bytes(x) &&
                      (rows == x.size(0) || (padding == Rows::kAny && reaches(x, rows, ld, k)));
  if (usable && rows == x.size(0) && rows > 1) return x;
  if (usable) return x.as_strided({rows, k}, {ld, 1});
  at::Tensor storage = at::zeros({rows, k}, x.options().dtype(at::kByte));
  storage.narrow(0, 0, x.size(0)).narrow(1, 0, x.size(1)).copy_(x.view(at::kByte));
  return storage.view(x.scalar_type());
}

// Scales as scale_sizes has them, for an operand of `rows` rows; 0 in the padding if copied.
at::Tensor padded_scale(const at::Tensor& scale, Granularity granularity, int64_t rows) {
  if (granularity == Granularity::kTensorwise || granularity == Granularity::kRowwise) {
    const at::Tensor flat = granularity == Granularity::kTensorwise
                                ? scale.reshape({})
                                : scale.reshape({-1}).contiguous();
    if (granularity == Granularity::kRowwise && rows > flat.size(0)) {
      return at::constant_pad_nd(flat, {0, rows - flat.size(0)});
    }
    return on_16_bytes(flat) ? flat : flat.clone();
  }
  const bool square = granularity == Granularity::kBlock128x128;
  const at::Tensor matrix = square ? scale : scale.t();
  const int64_t lines = matrix.size(0);
  const int64_t ld = square ? core::round_up(matrix.size(1), 4) : rows;
  const bool usable = (matrix.stride(1) == 1 || matrix.size(1) == 1) &&
                      (matrix.stride(0) == ld || lines == 1) && on_16_bytes(matrix) &&
                      reaches(matrix, lines, ld, ld);
  if (usable) return matrix.as_strided({lines, ld}, {ld, 1});
  at::Tensor storage = at::zeros({lines, ld}, scale.options());
  storage.narrow(1, 0, matrix.size(1)).copy_(matrix);
  return storage;
}

Side padded_side(const at::Tensor& codes, const at::Tensor& scale, Granularity granularity,
                 Rows padding) {
  const at::Tensor padded = padded_operand(codes, padding);
  return {padded, padded_scale(scale, granularity, padded.size(0)), granularity, codes.size(0)};
}

at::Tensor run(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
               const at::Tensor& scale_b, const Granularities& granularities,
               const Output& output) {
  const bool blockwise = is_blockwise(granularities.a);
  // Rows of out that are no multiple of 16 bytes need room for padded rows of b.
  const bool pad_rows = b.size(0) * static_cast<int64_t>(c10::elementSize(output.dtype)) % 16 != 0;
  const Rows of_a = blockwise ? Rows::kAny : Rows::kAsIs;
  const Rows of_b = blockwise ? Rows::kAny : pad_rows ? Rows::kZeros : Rows::kAsIs;
  return matmul(padded_side(a, scale_a, granularities.a, of_a),
                padded_side(b, scale_b, granularities.b, of_b), output);
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
  return run(
      a, b, scale_a, scale_b, contract.granularities,
      {.dtype = contract.out_dtype, .fast_accum = fast_accum, .bias = bias.value_or(at::Tensor())});
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
  const Granularities granularities =
      check_operands("scaled_mm_accumulate_", a, b, scale_a, scale_b);
  check_accumulate(out, a, b);
  if (out.numel() == 0 || a.size(1) == 0) return out;
  const c10::DeviceGuard guard(a.device());
  run(a, b, scale_a, scale_b, granularities,
      {.dtype = out.scalar_type(), .fast_accum = fast_accum, .into = out});
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
