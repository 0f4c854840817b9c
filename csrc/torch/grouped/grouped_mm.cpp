// Chooses how a grouped matmul runs: by the core's kernel (core/matmul/grouped_mm.cpp) on Hopper;
// elsewhere, and for extents that it refuses, by ATen's kernels, CUTLASS with offsets on the device
// too. What those of torch 2.11 ask for, and who provides it:
//   - e4m3 operands, both contiguous along the contracted dimension, extents in sixteens:
//     operands.cpp
//   - groups of rows may begin anywhere; groups of columns (wgrad) begin at multiples of 16 and are
//     never empty, which a device assertion checks: the tile table
//   - scales of rows, bf16 output: others are expanded, and cast
//   - compute capability 9.0: elsewhere the codes, exact in bf16, take the bf16 kernel, and scales
//     are applied to its output
// The CPU decodes and multiplies in fp32, a group at a time; so does a GPU with scales in blocks
// where the core's kernel does not run, and that waits for the offsets.
#include "torch/grouped/grouped_mm.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include "cpu/kernels.h"
#include "fp8/core_device.h"
#include "host/grouped_plan.h"
#include "torch/common/tensors.h"
#include "torch/matmul/batch_invariant.h"

namespace fp8::grouped {
namespace {

at::Tensor decoded(const at::Tensor& data) {
  at::Tensor out = at::empty(data.sizes(), data.options().dtype(at::kFloat));
  const int64_t cols = data.size(-1);
  cpu::decode(data.const_data_ptr(), core::Dtype::kE4M3, data.numel() / cols, cols, cols,
              out.mutable_data_ptr<float>());
  return out;
}

// a b^T of fp32 matrices.
at::Tensor rows_times_rows(const at::Tensor& a, const at::Tensor& b) {
  const bool fixed_order = batch_invariant::enabled() && a.is_cpu();
  return fixed_order ? batch_invariant::multiply_cpu(a, b) : at::mm(a, b.t());
}

template <typename Visit>
void for_groups(const at::Tensor& offsets, int64_t limit, const Visit& visit) {
  const auto* ends = offsets.const_data_ptr<int32_t>();
  int64_t begin = 0;
  for (int64_t g = 0; g < offsets.size(0); ++g) {
    const int64_t end = std::clamp<int64_t>(ends[g], begin, limit);
    visit(g, begin, end - begin);
    begin = end;
  }
}

at::Tensor multiply_rows_cpu(const Side& a, const Side& b, const at::Tensor& offsets,
                             at::ScalarType out_dtype) {
  const at::Tensor left = decoded(a.codes).mul_(a.scales.unsqueeze(1));
  const at::Tensor out =
      at::empty({a.codes.size(0), b.codes.size(1)}, a.scales.options().dtype(out_dtype));
  for_groups(offsets, left.size(0), [&](int64_t g, int64_t begin, int64_t rows) {
    if (rows == 0) return;
    const at::Tensor right = decoded(b.codes[g]);
    out.narrow(0, begin, rows)
        .copy_(rows_times_rows(left.narrow(0, begin, rows), right).mul_(b.scales[g]));
  });
  return out;
}

at::Tensor multiply_columns_cpu(const Side& a, const Side& b, const at::Tensor& padded_offsets,
                                at::ScalarType out_dtype) {
  const at::Tensor left = decoded(a.codes);
  const at::Tensor right = decoded(b.codes);
  const at::Tensor out = at::empty({padded_offsets.size(0), a.codes.size(0), b.codes.size(0)},
                                   a.scales.options().dtype(out_dtype));
  for_groups(padded_offsets, left.size(1), [&](int64_t g, int64_t begin, int64_t columns) {
    const at::Tensor product =
        at::mm(left.narrow(1, begin, columns), right.narrow(1, begin, columns).t());
    out[g].copy_(product.mul_(a.scales[g].unsqueeze(1)).mul_(b.scales[g]));
  });
  return out;
}

at::Tensor multiply_high_precision_cpu(const at::Tensor& a, const at::Tensor& b,
                                       const at::Tensor& offsets, at::ScalarType out_dtype) {
  const at::Tensor out =
      at::zeros({offsets.size(0), a.size(1), b.size(1)}, a.options().dtype(out_dtype));
  for_groups(offsets, a.size(0), [&](int64_t g, int64_t begin, int64_t rows) {
    if (rows == 0) return;
    out[g].copy_(at::mm(a.narrow(0, begin, rows).to(at::kFloat).t(),
                        b.narrow(0, begin, rows).to(at::kFloat)));
  });
  return out;
}

// Scales in blocks change along the contracted dimension: the operands are scaled first, in fp32.
// On any device, with the offsets on the CPU.
at::Tensor multiply_blocks(const Side& a, const Side& b, const at::Tensor& offsets,
                           at::ScalarType out_dtype) {
  const at::NoTF32Guard full_precision;
  const int64_t rows = a.codes.size(0);
  const int64_t features = b.codes.size(1);
  const int64_t k = a.codes.size(1);
  const auto spread = [](const at::Tensor& scales, int64_t dim, int64_t extent) {
    return scales.repeat_interleave(core::kScaleBlock, dim).narrow(dim, 0, extent);
  };
  const at::Tensor left =
      a.codes.to(at::kFloat).mul_(spread(a.scales.narrow(1, 0, rows).t(), 1, k));
  const at::Tensor out = at::empty({rows, features}, a.scales.options().dtype(out_dtype));
  for_groups(offsets, rows, [&](int64_t g, int64_t begin, int64_t count) {
    if (count == 0) return;
    const at::Tensor scales = b.scales[g].narrow(1, 0, core::blocks_of(k));
    const at::Tensor right =
        b.codes[g].to(at::kFloat).mul_(spread(spread(scales, 0, features), 1, k));
    out.narrow(0, begin, count).copy_(rows_times_rows(left.narrow(0, begin, count), right));
  });
  return out;
}

// One scale as one for each row of `shape`.
Side with_row_scales(const Side& side, at::IntArrayRef shape) {
  if (side.granularity != core::Granularity::kTensorwise) return side;
  return {side.codes, side.scales.expand(shape).contiguous(), core::Granularity::kRowwise,
          side.rows};
}

core::GroupedMmArgs args_of(const Side& a, const Side& b, const at::Tensor& offsets,
                            at::ScalarType out_dtype, bool fast_accum) {
  const bool blocks = is_blockwise(a.granularity);
  return {.columns = b.codes.dim() == 2,
          .groups = offsets.size(0),
          .m = a.codes.size(0),
          .n = b.codes.size(-2),
          .k = a.codes.size(1),
          .offsets = offsets.const_data_ptr<int32_t>(),
          .a = a.codes.const_data_ptr(),
          .b = b.codes.const_data_ptr(),
          .granularity = a.granularity,
          .a_scale = a.scales.const_data_ptr<float>(),
          .b_scale = b.scales.const_data_ptr<float>(),
          .a_scale_ld = blocks ? a.scales.stride(0) : 0,
          .b_scale_ld = blocks ? b.scales.stride(1) : 0,
          .out_dtype = to_core(out_dtype),
          .fast_accum = fast_accum};
}

// By the core's kernel, if it takes the problem: `shape` in out_dtype. Else undefined.
at::Tensor multiply_here(const Side& a, const Side& b, const at::Tensor& offsets,
                         at::IntArrayRef shape, at::ScalarType out_dtype, bool fast_accum) {
  core::GroupedMmArgs args = args_of(a, b, offsets, out_dtype, fast_accum);
  const bool suits = !a.codes.is_cpu() && core::suits_grouped_mm(args);
  if (!suits) {
    if (core::printing_plans()) {
      core::print_first_time(core::grouped_plan_line(
          args, a.codes.is_cpu() ? -1 : a.codes.device().index(),
          a.codes.is_cpu() || is_blockwise(a.granularity) ? "reference: fp32" : "ATen"));
    }
    return {};
  }
  at::Tensor out = empty_on(a.codes, shape, out_dtype);
  args.out = out.mutable_data_ptr();
  core::grouped_mm(args, cuda::current_stream(a.codes));
  return out;
}

bool has_scaled_kernel(const at::Tensor& t) {
  return core::compute_capability(t.device().index()) == 90;
}

at::Tensor scaled_grouped_mm(const Side& a, const Side& b, const at::Tensor& offsets,
                             bool fast_accum) {
  return at::_scaled_grouped_mm(a.codes, b.codes.transpose(-2, -1), a.scales, b.scales, offsets,
                                std::nullopt, std::nullopt, at::kBFloat16, fast_accum);
}

at::Tensor codes_mm(const Side& a, const Side& b, const at::Tensor& offsets) {
  return at::_grouped_mm(a.codes.to(at::kBFloat16), b.codes.to(at::kBFloat16).transpose(-2, -1),
                         offsets);
}

}  // namespace

at::Tensor multiply_rows(const Side& given_a, const Side& given_b, const at::Tensor& offsets,
                         at::ScalarType out_dtype, bool fast_accum) {
  const int64_t all_rows = given_a.codes.size(0);
  const int64_t features = given_b.codes.size(1);
  at::Tensor out =
      multiply_here(given_a, given_b, offsets, {all_rows, features}, out_dtype, fast_accum);
  if (out.defined()) return out;
  TORCH_CHECK_NOT_IMPLEMENTED(
      given_a.codes.is_cpu() || !batch_invariant::enabled(),
      join("fp8: inside fp8.batch_invariant expected a GPU of compute capability 9.0 for grouped ",
           "products, got one of ", core::compute_capability(given_a.codes.device().index())));
  if (is_blockwise(given_a.granularity)) {
    return multiply_blocks(given_a, given_b, offsets.cpu(), out_dtype);
  }
  const Side a = with_row_scales(given_a, {all_rows});
  const Side b = with_row_scales(given_b, {offsets.size(0), features});
  if (a.codes.is_cpu()) return multiply_rows_cpu(a, b, offsets, out_dtype);
  if (has_scaled_kernel(a.codes)) {
    return scaled_grouped_mm(a, b, offsets, fast_accum).to(out_dtype);
  }
  const at::Tensor rows = at::arange(a.codes.size(0), offsets.options());
  const at::Tensor group = at::searchsorted(offsets, rows, /*out_int32=*/false, /*right=*/true)
                               .clamp_max_(offsets.size(0) - 1);
  return codes_mm(a, b, offsets)
      .to(at::kFloat)
      .mul_(a.scales.unsqueeze(1))
      .mul_(b.scales.index_select(0, group))
      .to(out_dtype);
}

at::Tensor multiply_columns(const Side& a, const Side& b, const at::Tensor& padded_offsets,
                            at::ScalarType out_dtype, bool fast_accum) {
  at::Tensor out = multiply_here(a, b, padded_offsets,
                                 {padded_offsets.size(0), a.codes.size(0), b.codes.size(0)},
                                 out_dtype, fast_accum);
  if (out.defined()) return out;
  if (a.codes.is_cpu()) return multiply_columns_cpu(a, b, padded_offsets, out_dtype);
  if (has_scaled_kernel(a.codes)) {
    const Side flat_a{a.codes, a.scales.view(-1), a.granularity, a.rows};
    const Side flat_b{b.codes, b.scales.view(-1), b.granularity, b.rows};
    return scaled_grouped_mm(flat_a, flat_b, padded_offsets, fast_accum).to(out_dtype);
  }
  return codes_mm(a, b, padded_offsets)
      .to(at::kFloat)
      .mul_(a.scales.unsqueeze(2))
      .mul_(b.scales.unsqueeze(1))
      .to(out_dtype);
}

bool add_columns(const Side& a, const Side& b, const at::Tensor& padded_offsets,
                 const at::Tensor& out, bool fast_accum, bool overwrite) {
  core::GroupedMmArgs args = args_of(a, b, padded_offsets, at::kFloat, fast_accum);
  args.accumulate = !overwrite;
  args.out = out.mutable_data_ptr();
  if (a.codes.is_cpu() || !core::suits_grouped_mm(args)) return false;
  core::grouped_mm(args, cuda::current_stream(a.codes));
  return true;
}

at::Tensor multiply_high_precision(const at::Tensor& a, const at::Tensor& b,
                                   const at::Tensor& offsets, at::ScalarType out_dtype) {
  if (a.is_cpu()) return multiply_high_precision_cpu(a, b, offsets, out_dtype);
  // The kernel that needs no offsets on the host is bf16's. It wants rows that follow each other
  // and begin on 16 bytes, which a part of a larger tensor, or a row that is repeated, need not do.
  const auto operand = [](const at::Tensor& t) {
    const at::Tensor rows = t.to(at::kBFloat16);
    const bool dense = rows.stride(1) == 1 && rows.stride(0) == rows.size(1) && on_16_bytes(rows);
    return dense ? rows : rows.clone(at::MemoryFormat::Contiguous);
  };
  return at::_grouped_mm(operand(a).t(), operand(b), offsets).to(out_dtype);
}

}  // namespace fp8::grouped
