// Chooses how an FP8 matmul runs: cuBLASLt with scales, bias and accumulation in its epilogue; with
// padded rows of out where they are no multiple of 16 bytes (with block scales, padded rows and
// columns, since cuBLASLt strides over scales by their numbers); or, where cuBLASLt has no
// algorithm, by a high-precision matmul of the codes (exact in bf16) that gives the same values up
// to the order of accumulation. The CPU does the latter too.
#include "matmul/matmul.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include "common/cuda_context.h"
#include "common/tensors.h"
#include "cpu/kernels.h"
#include "matmul/plan_text.h"
#include "quantize/quantize.h"
#ifdef FP8_WITH_CUDA
#include "matmul/autotune.h"
#endif

namespace fp8 {
namespace {

using core::Granularity;

// ATen's own matmuls are used here; inside torch.autocast they would change the precision.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// Complete fp32 product -> out
at::Tensor finish_product(const at::Tensor& product, const MatmulOptions& options) {
  at::Tensor out = product;
  if (options.bias.defined()) out.add_(options.bias);
  if (options.accumulate.defined()) {
    return store_product(options.accumulate, out, options.overwrite);
  }
  return out.to(options.out_dtype);
}

// Unscaled fp32 product -> out
at::Tensor scale_product(const at::Tensor& product, const Operand& a, const Operand& b,
                         const MatmulOptions& options) {
  const bool rowwise = options.granularity == Granularity::kRowwise;
  const at::Tensor scale_a = rowwise ? a.scale.narrow(0, 0, a.rows).unsqueeze(1) : a.scale;
  const at::Tensor scale_b = rowwise ? b.scale.narrow(0, 0, b.rows).unsqueeze(0) : b.scale;
  at::Tensor out = product;
  out.mul_(rowwise ? scale_a : scale_a * scale_b);
  if (rowwise) out.mul_(scale_b);
  return finish_product(out, options);
}

// Block scales change along the contracted dimension: the operands are scaled before the product,
// in fp32.
at::Tensor matmul_blocks(const Operand& a, const Operand& b, const MatmulOptions& options) {
  const at::NoTF32Guard full_precision;
  const auto values = [](const Operand& operand, Granularity granularity) {
    const bool square = granularity == Granularity::kBlock128x128;
    return dequantize_matrix(
        operand.data.narrow(0, 0, operand.rows),
        scale_view(operand.scale, granularity, operand.rows, operand.data.size(1)), at::kFloat,
        {.rows = square ? core::kScaleBlock : 1, .cols = core::kScaleBlock});
  };
  return finish_product(
      at::mm(values(a, options.granularity), values(b, options.granularity_b).t()), options);
}

// FP8_PRINT_PLAN on the CPU, where nothing is planned: decode, then one fp32 matmul.
void print_cpu_plan(const Operand& a, const Operand& b, const MatmulOptions& options) {
  core::print_plan({.m = a.rows,
                    .n = b.rows,
                    .k = a.data.size(1),
                    .a_dtype = to_core(a.data.scalar_type()),
                    .lda = a.data.stride(0),
                    .b_dtype = to_core(b.data.scalar_type()),
                    .ldb = b.data.stride(0),
                    .granularity = options.granularity,
                    .granularity_b = options.granularity_b,
                    .bias = options.bias.defined() ? options.bias.const_data_ptr() : nullptr,
                    .bias_dtype = options.bias.defined() ? to_core(options.bias.scalar_type())
                                                         : core::Dtype::kFloat32,
                    .out_dtype = to_core(options.out_dtype),
                    .ldo = b.rows,
                    .accumulate = options.accumulate.defined(),
                    .fast_accum = options.fast_accum},
                   /*device=*/-1, {.algorithm = "reference: fp32", .launches = 0});
}

at::Tensor matmul_cpu(const Operand& a, const Operand& b, const MatmulOptions& options) {
  const NoAutocast no_autocast;
  if (core::printing_plans()) print_cpu_plan(a, b, options);
  if (is_blockwise(options.granularity)) return matmul_blocks(a, b, options);
  const int64_t k = a.data.size(1);
  const auto decoded = [&](const Operand& operand) {
    at::Tensor values = at::empty({operand.rows, k}, operand.data.options().dtype(at::kFloat));
    cpu::decode(operand.data.const_data_ptr(), to_core(operand.data.scalar_type()), operand.rows, k,
                operand.data.stride(0), values.mutable_data_ptr<float>());
    return values;
  };
  return scale_product(at::mm(decoded(a), decoded(b).t()), a, b, options);
}

#ifdef FP8_WITH_CUDA

at::Tensor matmul_dequantized(const Operand& a, const Operand& b, const MatmulOptions& options) {
  const NoAutocast no_autocast;
  if (is_blockwise(options.granularity)) return matmul_blocks(a, b, options);
  const auto codes = [](const Operand& operand) {
    return operand.data.narrow(0, 0, operand.rows).to(at::kBFloat16);
  };
  return scale_product(at::mm(codes(a), codes(b).t(), at::kFloat), a, b, options);
}

bool on_16_bytes(const at::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

at::Tensor matmul_cuda(const Operand& a, const Operand& b, const MatmulOptions& options) {
  const bool blockwise = is_blockwise(options.granularity);
  const int64_t m = blockwise ? pad16(a.rows) : a.rows;
  const int64_t n = b.rows;
  const at::Tensor& into = options.accumulate;
  const auto fills_rows = [&](at::ScalarType dtype) {
    return blockwise ? n % core::kPad == 0
                     : n * static_cast<int64_t>(c10::elementSize(dtype)) % 16 == 0;
  };
  // cuBLASLt adds to `into` itself, or writes it, only if it can write there; else the product is
  // made in fp32 first.
  const bool direct = into.defined() && m == a.rows && fills_rows(options.out_dtype) &&
                      into.is_contiguous() && on_16_bytes(into);
  const at::ScalarType out_dtype = into.defined() && !direct ? at::kFloat : options.out_dtype;
  const int64_t padded_n = fills_rows(out_dtype) ? n : pad16(n);

  const at::ScalarType native_bias = out_dtype == at::kHalf ? at::kHalf : at::kBFloat16;
  at::Tensor bias = options.bias;
  const bool fused_bias = bias.defined() && bias.scalar_type() == native_bias && !blockwise;
  if (fused_bias && padded_n != n) {
    bias = at::constant_pad_nd(bias, {0, padded_n - n});
  } else if (fused_bias && (!bias.is_contiguous() || !on_16_bytes(bias))) {
    bias = bias.clone(at::MemoryFormat::Contiguous);
  }

  at::Tensor out = direct ? into : empty_on(a.data, {m, padded_n}, out_dtype);
  const core::MatmulArgs args{.m = m,
                              .n = padded_n,
                              .k = a.data.size(1),
                              .a = a.data.const_data_ptr(),
                              .a_dtype = to_core(a.data.scalar_type()),
                              .lda = a.data.stride(0),
                              .b = b.data.const_data_ptr(),
                              .b_dtype = to_core(b.data.scalar_type()),
                              .ldb = b.data.stride(0),
                              .granularity = options.granularity,
                              .granularity_b = options.granularity_b,
                              .scale_a = a.scale.const_data_ptr<float>(),
                              .scale_b = b.scale.const_data_ptr<float>(),
                              .bias = fused_bias ? bias.const_data_ptr() : nullptr,
                              .bias_dtype = to_core(native_bias),
                              .out = out.mutable_data_ptr(),
                              .out_dtype = to_core(out_dtype),
                              .ldo = padded_n,
                              .accumulate = direct && !options.overwrite,
                              .fast_accum = options.fast_accum,
                              .device = a.data.device().index()};
  const cudaStream_t stream = cuda::current_stream(a.data);
  core::MatmulPlan plan = core::plan_matmul(args, stream);
  if (!plan.supported) return matmul_dequantized(a, b, options);
  if (autotune::enabled()) autotune::tune(args, plan, out);

  at::Tensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = empty_on(a.data, {static_cast<int64_t>(plan.workspace_bytes)}, at::kByte);
  }
  core::run_matmul(plan, args, workspace.defined() ? workspace.mutable_data_ptr() : nullptr,
                   stream);
  if (direct) return into;
  if (m != a.rows) out = out.narrow(0, 0, a.rows);
  if (padded_n != n) out = out.narrow(1, 0, n).contiguous();
  // With block scales cuBLASLt takes no bias. Adding to an output that holds the bias already was
  // measured: it rounds twice too, and costs twice the bytes of this pass.
  if (bias.defined() && !fused_bias) out.add_(bias);
  return into.defined() ? store_product(into, out, options.overwrite) : out;
}

#endif  // FP8_WITH_CUDA

}  // namespace

at::Tensor store_product(const at::Tensor& into, const at::Tensor& product, bool overwrite) {
  at::Tensor destination = into;
  // The sum of mixed dtypes is made in fp32 and rounded where it is stored: one launch.
  return overwrite ? destination.copy_(product) : at::add_out(destination, product, into);
}

at::Tensor matmul(const Operand& a, const Operand& b, const MatmulOptions& options) {
  const bool rows_of_blocks = options.granularity == Granularity::kBlock1x128 &&
                              options.granularity_b == Granularity::kBlock1x128;
  if (rows_of_blocks && a.data.size(1) <= core::kScaleBlock) {  // one block a row: rowwise
    const at::Tensor scale_a = a.scale.view({-1});
    const at::Tensor scale_b = b.scale.view({-1});
    MatmulOptions rowwise = options;
    rowwise.granularity = rowwise.granularity_b = Granularity::kRowwise;
    rowwise.fast_accum = false;
    return matmul({a.data, scale_a, a.rows}, {b.data, scale_b, b.rows}, rowwise);
  }
  if (a.data.is_cpu()) return matmul_cpu(a, b, options);
#ifdef FP8_WITH_CUDA
  return matmul_cuda(a, b, options);
#else
  throw_no_cuda(a.data);
#endif
}

}  // namespace fp8
