// Chooses how an FP8 matmul runs: cuBLASLt with scales, bias and accumulation in its epilogue; with
// padded rows of out where they are no multiple of 16 bytes (with block scales, padded rows and
// columns, since cuBLASLt strides over scales by their numbers); or, where cuBLASLt has no
// algorithm, by a high-precision matmul of the codes (exact in bf16) that gives the same values up
// to the order of accumulation. The CPU does the latter too.
#include "torch/matmul/matmul.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include "cpu/kernels.h"
#include "host/plan_text.h"
#include "torch/common/cuda_context.h"
#include "torch/common/tensors.h"
#include "torch/matmul/autotune.h"
#include "torch/matmul/batch_invariant.h"

namespace fp8 {
namespace {

using core::Granularity;

// ATen's own matmuls are used here; inside torch.autocast they would change the precision.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// a b^T of fp32 matrices
at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, const Output& output) {
  return output.batch_invariant ? batch_invariant::multiply_cpu(a, b) : at::mm(a, b.t());
}

// Complete fp32 product -> out
at::Tensor finish_product(const at::Tensor& product, const Output& output) {
  at::Tensor out = product;
  if (output.bias.defined()) out.add_(output.bias);
  if (output.into.defined()) return store_product(output.into, out, output.overwrite);
  return out.to(output.dtype);
}

// Unscaled fp32 product -> out
at::Tensor scale_product(const at::Tensor& product, const Side& a, const Side& b,
                         const Output& output) {
  const bool rowwise = a.granularity == Granularity::kRowwise;
  const at::Tensor scale_a = rowwise ? a.scales.narrow(0, 0, a.rows).unsqueeze(1) : a.scales;
  const at::Tensor scale_b = rowwise ? b.scales.narrow(0, 0, b.rows).unsqueeze(0) : b.scales;
  at::Tensor out = product;
  out.mul_(rowwise ? scale_a : scale_a * scale_b);
  if (rowwise) out.mul_(scale_b);
  return finish_product(out, output);
}

// Block scales change along the contracted dimension: the operands are scaled before the product,
// in fp32.
at::Tensor matmul_blocks(const Side& a, const Side& b, const Output& output) {
  const at::NoTF32Guard full_precision;
  const auto values = [](const Side& side) {
    const bool square = side.granularity == Granularity::kBlock128x128;
    return dequantize_matrix(side.codes.narrow(0, 0, side.rows),
                             scale_view(side, side.codes.size(1)), at::kFloat,
                             {.rows = square ? core::kScaleBlock : 1, .cols = core::kScaleBlock});
  };
  return finish_product(multiply(values(a), values(b), output), output);
}

// FP8_PRINT_PLAN on the CPU, where nothing is planned: decode, then one fp32 matmul.
void print_cpu_plan(const Side& a, const Side& b, const Output& output) {
  core::print_plan({.m = a.rows,
                    .n = b.rows,
                    .k = a.codes.size(1),
                    .a_dtype = to_core(a.codes.scalar_type()),
                    .lda = a.codes.stride(0),
                    .b_dtype = to_core(b.codes.scalar_type()),
                    .ldb = b.codes.stride(0),
                    .granularity = a.granularity,
                    .granularity_b = b.granularity,
                    .bias = output.bias.defined() ? output.bias.const_data_ptr() : nullptr,
                    .bias_dtype = output.bias.defined() ? to_core(output.bias.scalar_type())
                                                        : core::Dtype::kFloat32,
                    .out_dtype = to_core(output.dtype),
                    .ldo = b.rows,
                    .accumulate = output.into.defined(),
                    .fast_accum = output.fast_accum},
                   /*device=*/-1, {.algorithm = "reference: fp32", .launches = 0});
}

at::Tensor matmul_cpu(const Side& a, const Side& b, const Output& output) {
  const NoAutocast no_autocast;
  if (core::printing_plans()) print_cpu_plan(a, b, output);
  if (is_blockwise(a.granularity)) return matmul_blocks(a, b, output);
  const int64_t k = a.codes.size(1);
  const auto decoded = [&](const Side& side) {
    at::Tensor values = at::empty({side.rows, k}, side.codes.options().dtype(at::kFloat));
    cpu::decode(side.codes.const_data_ptr(), to_core(side.codes.scalar_type()), side.rows, k,
                side.codes.stride(0), values.mutable_data_ptr<float>());
    return values;
  };
  return scale_product(multiply(decoded(a), decoded(b), output), a, b, output);
}

at::Tensor matmul_dequantized(const Side& a, const Side& b, const Output& output) {
  const NoAutocast no_autocast;
  if (is_blockwise(a.granularity)) return matmul_blocks(a, b, output);
  const auto codes = [](const Side& side) {
    return side.codes.narrow(0, 0, side.rows).to(at::kBFloat16);
  };
  return scale_product(at::mm(codes(a), codes(b).t(), at::kFloat), a, b, output);
}

at::Tensor matmul_cuda(const Side& a, const Side& b, const Output& output) {
  const bool blockwise = is_blockwise(a.granularity);
  const int64_t m = blockwise ? pad16(a.rows) : a.rows;
  const int64_t n = b.rows;
  const at::Tensor& into = output.into;
  const auto fills_rows = [&](at::ScalarType dtype) {
    return blockwise ? n % core::kPad == 0
                     : n * static_cast<int64_t>(c10::elementSize(dtype)) % 16 == 0;
  };
  // cuBLASLt adds to `into` itself, or writes it, only if it can write there; else the product is
  // made in fp32 first.
  const bool direct = into.defined() && m == a.rows && fills_rows(output.dtype) &&
                      into.is_contiguous() && on_16_bytes(into);
  const at::ScalarType out_dtype = into.defined() && !direct ? at::kFloat : output.dtype;
  const int64_t padded_n = fills_rows(out_dtype) ? n : pad16(n);

  const at::ScalarType native_bias = out_dtype == at::kHalf ? at::kHalf : at::kBFloat16;
  at::Tensor bias = output.bias;
  const bool fused_bias = bias.defined() && bias.scalar_type() == native_bias && !blockwise;
  if (fused_bias && padded_n != n) {
    bias = at::constant_pad_nd(bias, {0, padded_n - n});
  } else if (fused_bias && (!bias.is_contiguous() || !on_16_bytes(bias))) {
    bias = bias.clone(at::MemoryFormat::Contiguous);
  }

  at::Tensor out = direct ? into : empty_on(a.codes, {m, padded_n}, out_dtype);
  const core::MatmulArgs args{.m = m,
                              .n = padded_n,
                              .k = a.codes.size(1),
                              .a = a.codes.const_data_ptr(),
                              .a_dtype = to_core(a.codes.scalar_type()),
                              .lda = a.codes.stride(0),
                              .b = b.codes.const_data_ptr(),
                              .b_dtype = to_core(b.codes.scalar_type()),
                              .ldb = b.codes.stride(0),
                              .granularity = a.granularity,
                              .granularity_b = b.granularity,
                              .scale_a = a.scales.const_data_ptr<float>(),
                              .scale_b = b.scales.const_data_ptr<float>(),
                              .bias = fused_bias ? bias.const_data_ptr() : nullptr,
                              .bias_dtype = to_core(native_bias),
                              .out = out.mutable_data_ptr(),
                              .out_dtype = to_core(out_dtype),
                              .ldo = padded_n,
                              .accumulate = direct && !output.overwrite,
                              .fast_accum = output.fast_accum,
                              .device = a.codes.device().index()};
  const core::Stream stream = cuda::current_stream(a.codes);
  core::MatmulPlan plan = core::plan_matmul(args, stream);
  if (!plan.supported) return matmul_dequantized(a, b, output);
  if (autotune::enabled()) autotune::tune(args, plan, out);

  at::Tensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = empty_on(a.codes, {static_cast<int64_t>(plan.workspace_bytes)}, at::kByte);
  }
  core::run_matmul(plan, args, workspace.defined() ? workspace.mutable_data_ptr() : nullptr,
                   stream);
  if (direct) return into;
  if (m != a.rows) out = out.narrow(0, 0, a.rows);
  if (padded_n != n) out = out.narrow(1, 0, n).contiguous();
  // With block scales cuBLASLt takes no bias. Adding to an output that holds the bias already was
  // measured: it rounds twice too, and costs twice the bytes of this pass.
  if (bias.defined() && !fused_bias) out.add_(bias);
  return into.defined() ? store_product(into, out, output.overwrite) : out;
}

}  // namespace

at::Tensor store_product(const at::Tensor& into, const at::Tensor& product, bool overwrite) {
  at::Tensor destination = into;
  // The sum of mixed dtypes is made in fp32 and rounded where it is stored: one launch.
  return overwrite ? destination.copy_(product) : at::add_out(destination, product, into);
}

at::Tensor matmul(const Side& a, const Side& b, const Output& output) {
  const bool rows_of_blocks =
      a.granularity == Granularity::kBlock1x128 && b.granularity == Granularity::kBlock1x128;
  if (rows_of_blocks && a.codes.size(1) <= core::kScaleBlock) {  // one block a row: rowwise
    const auto by_row = [](const Side& side) {
      return Side{side.codes, side.scales.view({-1}), Granularity::kRowwise, side.rows};
    };
    Output split = output;
    split.fast_accum = false;
    return matmul(by_row(a), by_row(b), split);
  }
  if (a.codes.is_cpu()) return matmul_cpu(a, b, output);
  return output.batch_invariant ? batch_invariant::multiply_cuda(a, b, output)
                                : matmul_cuda(a, b, output);
}

}  // namespace fp8
