// The public grouped matmul: what it accepts, what it returns, and how foreign operands become
// sides that a kernel reads.
#include "torch/grouped/grouped_mm_op.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/tensors.h"
#include "torch/grouped/grouped_mm.h"

namespace fp8 {
namespace {

using core::Granularity;

constexpr const char* kOp = "grouped_mm";

struct GroupedMmContract {
  bool columns = false;  // groups are columns of both operands
  Granularity granularity = Granularity::kTensorwise;
  at::ScalarType out_dtype = at::kBFloat16;
};

void check_codes(const char* name, const at::Tensor& t) {
  FP8_CHECK_TYPE(t.scalar_type() == at::kFloat8_e4m3fn, "fp8::", kOp, ": expected ", name,
                 " in float8_e4m3fn, got ", t.scalar_type());
}

c10::SymInt blocks(const c10::SymInt& extent) {
  return (extent + (core::kScaleBlock - 1)) / core::kScaleBlock;
}

bool has_shape(const at::Tensor& t, std::initializer_list<c10::SymInt> shape) {
  return t.sym_sizes() == c10::SymIntArrayRef(shape.begin(), shape.size());
}

// Where two readings are possible they mean the same: up to K = 128 a block of a row is the row,
// and of one row a square is no more than that.
Granularity check_scales(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                         const at::Tensor& scale_b, bool columns) {
  FP8_CHECK_TYPE(scale_a.scalar_type() == at::kFloat && scale_b.scalar_type() == at::kFloat,
                 "fp8::", kOp, ": expected scales in float32, got scale_a ", scale_a.scalar_type(),
                 ", scale_b ", scale_b.scalar_type());
  const c10::SymInt& rows = a.sym_size(0);
  if (columns) {
    FP8_CHECK_VALUE(scale_a.dim() == 2 && scale_a.sym_size(1) == rows && scale_b.dim() == 2 &&
                        scale_b.sym_size(1) == b.sym_size(0),
                    "fp8::", kOp,
                    ": expected scale_a [E, M] and scale_b [E, N], got a=", a.sym_sizes(),
                    ", b=", b.sym_sizes(), ", scale_a=", scale_a.sym_sizes(),
                    ", scale_b=", scale_b.sym_sizes());
    return Granularity::kRowwise;
  }
  if (scale_a.dim() == 0 && scale_b.dim() == 0) return Granularity::kTensorwise;
  const c10::SymInt groups = b.sym_size(0);
  if (has_shape(scale_a, {rows, 1}) && has_shape(scale_b, {groups, b.sym_size(1), 1})) {
    return Granularity::kRowwise;
  }
  const c10::SymInt k_blocks = blocks(a.sym_size(1));
  FP8_CHECK_VALUE(has_shape(scale_a, {rows, k_blocks}) &&
                      has_shape(scale_b, {groups, blocks(b.sym_size(1)), k_blocks}),
                  "fp8::", kOp,
                  ": expected scale_a and scale_b both [] (tensorwise), [R, 1] and [E, N, 1] "
                  "(rowwise), or [R, ceil(K / 128)] and [E, ceil(N / 128), ceil(K / 128)] "
                  "(blockwise); got a=",
                  a.sym_sizes(), ", b=", b.sym_sizes(), ", scale_a=", scale_a.sym_sizes(),
                  ", scale_b=", scale_b.sym_sizes());
  return Granularity::kBlock1x128;
}

GroupedMmContract check_grouped_mm(const at::Tensor& a, const at::Tensor& b,
                                   const at::Tensor& scale_a, const at::Tensor& scale_b,
                                   const at::Tensor& offsets,
                                   std::optional<at::ScalarType> out_dtype) {
  check_codes("a", a);
  check_codes("b", b);
  FP8_CHECK_VALUE(a.dim() == 2 && (b.dim() == 3 || b.dim() == 2), "fp8::", kOp,
                  ": expected a=[R, K] and b=[E, N, K] (groups of rows), or a=[M, L] and b=[N, L] "
                  "(groups of columns), got a=",
                  a.sym_sizes(), ", b=", b.sym_sizes());
  FP8_CHECK_VALUE(a.sym_size(1) == b.sym_size(-1), "fp8::", kOp,
                  ": a and b must share the last dimension, got a=", a.sym_sizes(),
                  ", b=", b.sym_sizes());
  FP8_CHECK_TYPE(offsets.scalar_type() == at::kInt, "fp8::", kOp,
                 ": expected offsets in int32, got ", offsets.scalar_type());
  const bool columns = b.dim() == 2;
  const c10::SymInt groups = columns && scale_a.dim() > 0 ? scale_a.sym_size(0) : b.sym_size(0);
  FP8_CHECK_VALUE(offsets.dim() == 1 && offsets.sym_size(0) == groups, "fp8::", kOp,
                  ": expected offsets of shape [E] = [", groups, "], got ", offsets.sym_sizes());
  FP8_CHECK_VALUE(groups <= core::kMaxGroups, "fp8::", kOp, ": expected at most ", core::kMaxGroups,
                  " groups, got ", groups);
  const Granularity granularity = check_scales(a, b, scale_a, scale_b, columns);
  FP8_CHECK_SAME_DEVICE(kOp, "b", b, "a", a);
  FP8_CHECK_SAME_DEVICE(kOp, "scale_a", scale_a, "a", a);
  FP8_CHECK_SAME_DEVICE(kOp, "scale_b", scale_b, "a", a);
  FP8_CHECK_SAME_DEVICE(kOp, "offsets", offsets, "a", a);
  const at::ScalarType out = out_dtype.value_or(at::kBFloat16);
  FP8_CHECK_TYPE(is_high_precision(out), "fp8::", kOp,
                 ": expected out_dtype bfloat16, float16 or float32, got ", out);
  return {columns, granularity, out};
}

// Contiguous codes whose last two extents are multiples of 16, by a copy with zeros where need be.
// rows: of the last two, whether the first one counts.
at::Tensor padded_codes(const at::Tensor& codes, bool rows) {
  const int64_t of_k = pad16(codes.size(-1)) - codes.size(-1);
  const int64_t of_rows = rows ? pad16(codes.size(-2)) - codes.size(-2) : 0;
  if (of_k == 0 && of_rows == 0) {
    return codes.is_contiguous() && on_16_bytes(codes) ? codes
                                                       : codes.clone(at::MemoryFormat::Contiguous);
  }
  return at::constant_pad_nd(codes.view(at::kByte), {0, of_k, 0, of_rows})
      .contiguous()
      .view(codes.scalar_type());
}

// Scales of the padded rows are 1: what they scale is not returned.
at::Tensor padded_scales(const at::Tensor& scales, int64_t rows) {
  return rows == scales.size(-1)
             ? scales.contiguous()
             : at::constant_pad_nd(scales, {0, rows - scales.size(-1)}, 1).contiguous();
}

// [R, blocks of K] as the kernel reads it, [blocks of K, >= R]: what quantize_blockwise_1x128 makes
// has that layout.
at::Tensor block_scales_of_rows(const at::Tensor& scale) {
  const at::Tensor matrix = scale.t();
  const bool usable = matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1);
  return usable ? matrix : matrix.clone(at::MemoryFormat::Contiguous);
}

// [E, blocks of N, blocks of K], without gaps between the matrices.
at::Tensor block_scales_of_stack(const at::Tensor& scale) {
  const bool usable = scale.stride(2) == 1 && scale.stride(1) >= scale.size(2) &&
                      (scale.size(0) == 1 || scale.stride(0) == scale.size(1) * scale.stride(1));
  // A copy: contiguous() leaves what strides an extent of 1 has.
  return usable ? scale : scale.clone(at::MemoryFormat::Contiguous);
}

at::Tensor leading_columns(const at::Tensor& out, int64_t cols) {
  return out.size(-1) == cols ? out : out.narrow(-1, 0, cols).contiguous();
}

at::Tensor of_columns(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                      const at::Tensor& scale_b, const at::Tensor& offsets,
                      at::ScalarType out_dtype, bool fast_accum) {
  const int64_t groups = offsets.size(0);
  if (a.numel() == 0 || b.numel() == 0 || groups == 0) {
    return at::zeros({groups, a.size(0), b.size(0)}, a.options().dtype(out_dtype));
  }
  const auto side = [](const at::Tensor& codes, const at::Tensor& scale) {
    const at::Tensor padded = padded_codes(codes, /*rows=*/true);
    return Side{padded, padded_scales(scale, padded.size(0)), Granularity::kRowwise, codes.size(0)};
  };
  const at::Tensor out =
      grouped::multiply_columns(side(a, scale_a), side(b, scale_b), offsets, out_dtype, fast_accum);
  return leading_columns(out.size(1) == a.size(0) ? out : out.narrow(1, 0, a.size(0)), b.size(0))
      .contiguous();
}

at::Tensor of_rows(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                   const at::Tensor& scale_b, const at::Tensor& offsets, Granularity granularity,
                   at::ScalarType out_dtype, bool fast_accum) {
  const int64_t groups = offsets.size(0);
  const int64_t features = b.size(1);
  if (a.numel() == 0 || b.numel() == 0) {
    return at::zeros({a.size(0), features}, a.options().dtype(out_dtype));
  }
  const at::Tensor a_codes = padded_codes(a, /*rows=*/false);
  const at::Tensor b_codes = padded_codes(b, /*rows=*/true);
  Side left{a_codes, scale_a, granularity, a.size(0)};
  Side right{b_codes, scale_b, granularity, b_codes.size(1)};
  if (granularity == Granularity::kRowwise) {
    left.scales = scale_a.reshape({-1}).contiguous();
    right.scales = padded_scales(scale_b.squeeze(2), b_codes.size(1));
  } else if (granularity == Granularity::kBlock1x128) {
    left.scales = block_scales_of_rows(scale_a);
    right.scales = block_scales_of_stack(scale_b);
  }
  const at::Tensor out = grouped::multiply_rows(left, right, offsets, out_dtype, fast_accum);
  const core::FinishRowsArgs args{.x = out.mutable_data_ptr(),
                                  .dtype = to_core(out_dtype),
                                  .rows = out.size(0),
                                  .cols = out.size(1),
                                  .ld = out.size(1),
                                  .groups = groups,
                                  .offsets = offsets.const_data_ptr<int32_t>()};
  FP8_RUN_PASS(finish_rows, out, args);
  return leading_columns(out, features);
}

}  // namespace

at::Tensor kernel::grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                              const at::Tensor& scale_b, const at::Tensor& given_offsets,
                              std::optional<at::ScalarType> out_dtype, bool fast_accum) {
  const GroupedMmContract contract =
      check_grouped_mm(a, b, scale_a, scale_b, given_offsets, out_dtype);
  const c10::DeviceGuard guard(a.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor offsets = given_offsets.contiguous();
  return contract.columns
             ? of_columns(a, b, scale_a, scale_b, offsets, contract.out_dtype, fast_accum)
             : of_rows(a, b, scale_a, scale_b, offsets, contract.granularity, contract.out_dtype,
                       fast_accum);
}

at::Tensor meta::grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,
                            const at::Tensor& scale_b, const at::Tensor& offsets,
                            std::optional<at::ScalarType> out_dtype, bool) {
  const GroupedMmContract contract = check_grouped_mm(a, b, scale_a, scale_b, offsets, out_dtype);
  const at::TensorOptions options = a.options().dtype(contract.out_dtype);
  return contract.columns
             ? at::empty_symint({offsets.sym_size(0), a.sym_size(0), b.sym_size(0)}, options)
             : at::empty_symint({a.sym_size(0), b.sym_size(1)}, options);
}

}  // namespace fp8
