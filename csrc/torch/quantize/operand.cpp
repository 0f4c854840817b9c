// Memory and device of a quantization: allocates the padded destinations, then hands raw pointers
// to the CUDA kernels (fp8_core) or the CPU kernels, which take the same arguments.
#include "torch/quantize/operand.h"

#include <ATen/ATen.h>

#include "cpu/grouped.h"
#include "cpu/kernels.h"
#include "fp8/core_norm.h"
#include "host/quantize_text.h"
#include "torch/common/cuda_context.h"
#include "torch/common/tensors.h"
#include "torch/quantize/whole_gpu.h"

namespace fp8 {
namespace {

using core::Granularity;

// --- one matrix ---

// Storage for what is asked for of a matrix [rows, cols] on x's device, nothing written.
Operand allocate(const at::Tensor& x, int64_t rows, int64_t cols, const QuantizeRequest& request) {
  const auto side = [&](int64_t of_side, int64_t contracted, at::Tensor scales) {
    const int64_t ld = pad16(contracted);
    const int64_t lines = pad16(of_side);
    if (!scales.defined()) {
      scales = empty_on(x, scale_sizes(request.granularity, lines, ld), at::kFloat);
    }
    return Side{.codes = empty_on(x, {lines, ld}, request.dtype),
                .scales = std::move(scales),
                .granularity = request.granularity,
                .rows = of_side};
  };
  at::Tensor scale;  // of both sides
  if (request.granularity == Granularity::kTensorwise) scale = empty_on(x, {}, at::kFloat);
  Operand out;
  if (request.along_cols) out.along_cols = side(rows, cols, scale);
  if (request.along_rows) out.along_rows = side(cols, rows, scale);
  if (request.keep_amax) {
    out.amax = request.group_rows > 0 ? empty_on(x, {rows / request.group_rows, cols}, at::kFloat)
                                      : empty_on(x, {}, at::kFloat);
  }
  if (request.column_sum) out.column_sum = empty_on(x, {cols}, *request.column_sum);
  return out;
}

void fill_empty(const Operand& out, const QuantizeRequest& request) {
  const bool given = request.scaling.source == Scaling::Source::kGiven;
  for (const Side* side : {&out.along_cols, &out.along_rows}) {
    if (!side->defined()) continue;
    side->codes.zero_();
    side->scales.fill_(1);
    if (given) side->scales.copy_(request.scaling.tensor);
  }
  if (out.amax.defined()) out.amax.zero_();
  if (out.column_sum.defined()) out.column_sum.zero_();
}

core::Destination destination(const Side& side) {
  return {side.codes.mutable_data_ptr(), side.codes.size(0), side.codes.size(1)};
}

// Of a matrix [rows, cols] of x's dtype and device; where it lies is the caller's to say.
core::QuantizeArgs quantize_args(const at::Tensor& x, int64_t rows, int64_t cols,
                                 const Operand& out, const QuantizeRequest& request) {
  core::QuantizeArgs args{.x_dtype = to_core(x.scalar_type()),
                          .rows = rows,
                          .cols = cols,
                          .dtype = to_core(request.dtype),
                          .granularity = request.granularity,
                          .power_of_two = request.power_of_two,
                          .pdl = request.pdl,
                          .whole_gpu = whole_gpu_launches(),
                          .device = x.is_cuda() ? x.device().index() : -1};
  if (out.along_cols.defined()) {
    args.data = destination(out.along_cols);
    args.scale = out.along_cols.scales.mutable_data_ptr<float>();
  }
  if (out.along_rows.defined()) {
    args.data_t = destination(out.along_rows);
    args.scale_t = out.along_rows.scales.mutable_data_ptr<float>();
  }
  if (request.granularity == Granularity::kTensorwise) {
    if (!out.along_cols.defined()) args.scale = args.scale_t;  // there is one
    args.scale_t = nullptr;
    args.scaling = core_scaling(request.scaling);
    if (out.amax.defined()) args.amax_out = out.amax.mutable_data_ptr<float>();
  } else if (out.amax.defined()) {
    args.column_amax = out.amax.mutable_data_ptr<float>();
    args.group_rows = request.group_rows;
  }
  if (out.column_sum.defined()) {
    args.column_sum = out.column_sum.mutable_data_ptr();
    args.column_sum_dtype = to_core(*request.column_sum);
  }
  return args;
}

at::Tensor workspace_of(size_t bytes, const at::Tensor& like) {
  return bytes == 0 ? at::Tensor() : empty_on(like, {static_cast<int64_t>(bytes)}, at::kByte);
}

// --- a stack of matrices, stored [groups, rows, cols] ---

// Codes along cols, a scale for each row: one matrix of groups * rows. With the maxima of columns
// where they are asked for.
struct RowsOfStack {
  Side side;
  at::Tensor amax;
};
RowsOfStack rows_of_stack(const at::Tensor& stored, const QuantizeRequest& request) {
  const int64_t rows = stored.size(0) * stored.size(1);
  QuantizeRequest of_rows = request;
  of_rows.along_cols = true;
  of_rows.along_rows = false;
  of_rows.scaling = Scaling::dynamic();
  of_rows.group_rows = request.keep_amax ? stored.size(1) : 0;
  const Operand flat = operand::make(stored.view({rows, stored.size(2)}), of_rows);
  return {{.codes = flat.along_cols.codes.view(stored.sizes()),
           .scales = flat.along_cols.scales.view(stored.sizes().slice(0, 2)),
           .granularity = Granularity::kRowwise,
           .rows = stored.size(1)},
          flat.amax};
}

// Codes along rows, a scale for each column, transposed: [groups, cols, rows].
Side columns_of_stack(const at::Tensor& stored, const QuantizeRequest& request) {
  const int64_t groups = stored.size(0);
  const int64_t rows = stored.size(1);
  const int64_t cols = stored.size(2);
  Side out{.codes = empty_on(stored, {groups, cols, rows}, at::kFloat8_e4m3fn),
           .scales = empty_on(stored, {groups, cols}, at::kFloat),
           .granularity = Granularity::kRowwise,
           .rows = cols};
  const bool known = request.scaling.source == Scaling::Source::kKnownAmax;
  const at::Tensor amax =
      known ? request.scaling.tensor : empty_on(stored, {groups, cols}, at::kInt);
  TORCH_INTERNAL_ASSERT(amax.is_contiguous() && amax.numel() == groups * cols);
  const core::GroupColumnsArgs args{.x = stored.const_data_ptr(),
                                    .x_dtype = to_core(stored.scalar_type()),
                                    .cols = cols,
                                    .ld = cols,
                                    .groups = groups,
                                    .group_rows = rows,
                                    .data_t = out.codes.mutable_data_ptr(),
                                    .ld_t = rows,
                                    .scale_t = out.scales.mutable_data_ptr<float>(),
                                    .amax = static_cast<uint32_t*>(amax.mutable_data_ptr()),
                                    .amax_is_known = known,
                                    .power_of_two = request.power_of_two};
  FP8_RUN_PASS(quantize_group_columns, stored, args);
  return out;
}

// Squares of the stored matrices, both ways.
Operand squares_of_stack(const at::Tensor& stored, bool along_cols, bool along_rows,
                         bool power_of_two) {
  const int64_t groups = stored.size(0);
  core::StackSquaresArgs args{.x = stored.const_data_ptr(),
                              .x_dtype = to_core(stored.scalar_type()),
                              .groups = groups,
                              .rows = stored.size(1),
                              .cols = stored.size(2),
                              .power_of_two = power_of_two};
  const auto side = [&](int64_t rows, int64_t cols, void*& data, float*& scale) {
    const auto scales = scale_sizes(Granularity::kBlock128x128, rows, cols);
    Side out{.codes = empty_on(stored, {groups, rows, cols}, at::kFloat8_e4m3fn),
             .scales = empty_on(stored, {groups, scales[0], scales[1]}, at::kFloat),
             .granularity = Granularity::kBlock128x128,
             .rows = rows};
    data = out.codes.mutable_data_ptr();
    scale = out.scales.mutable_data_ptr<float>();
    return out;
  };
  Operand out;
  if (along_cols) out.along_cols = side(args.rows, args.cols, args.data, args.scale);
  if (along_rows) out.along_rows = side(args.cols, args.rows, args.data_t, args.scale_t);
  FP8_RUN_PASS(quantize_stack_squares, stored, args);
  return out;
}

bool are_scales_of(const at::Tensor& codes, const at::Tensor& scales, Granularity granularity) {
  if (granularity == Granularity::kTensorwise) return scales.numel() == 1;
  const bool in_groups = granularity == Granularity::kRowwise && scales.dim() == 2;
  if (in_groups) return scales.size(1) == codes.size(0);
  return scales.sizes().equals(scale_sizes(granularity, codes.size(0), codes.size(1)));
}

}  // namespace

Operand operand::make(const at::Tensor& x, const QuantizeRequest& request) {
  Operand out = allocate(x, x.size(0), x.size(1), request);
  if (x.numel() == 0) {
    fill_empty(out, request);
    return out;
  }
  core::QuantizeArgs args = quantize_args(x, x.size(0), x.size(1), out, request);
  args.x = x.const_data_ptr();
  args.ld = leading_dim(x);
  if (x.is_cpu()) {
    if (core::printing_plans()) core::print_plan(args, -1, {}, 0);
    cpu::quantize(args);
    return out;
  }
  const at::Tensor workspace = workspace_of(core::quantize_workspace_bytes(args), x);
  if (workspace.defined()) args.workspace = workspace.mutable_data_ptr();
  const core::Stream stream = cuda::current_stream(x);
  if (request.scaling.source == Scaling::Source::kKnownAmax) {
    core::quantize_normed(args, request.scaling.tensor.numel(), stream);
  } else {
    core::quantize(args, stream);
  }
  out.launched = true;
  return out;
}

Operand operand::make_joined(at::TensorList parts, bool side_by_side,
                             const QuantizeRequest& request) {
  const at::Tensor& first = parts.front();
  if (parts.size() == 1) return make(first, request);
  const int64_t dim = side_by_side ? 1 : 0;
  const auto copied_together = [&] {
    QuantizeRequest whole = request;
    whole.pdl = false;  // the copy is the launch before
    return make(at::cat(parts, dim), whole);
  };
  if (parts.size() > core::kMaxJoinedParts) return copied_together();
  core::JoinedArgs args{.side_by_side = side_by_side};
  int64_t total = 0;
  for (const at::Tensor& part : parts) {
    args.parts[args.count++] = {part.const_data_ptr(), part.size(dim), leading_dim(part)};
    total += part.size(dim);
  }
  const int64_t rows = side_by_side ? first.size(0) : total;
  const int64_t cols = side_by_side ? total : first.size(1);
  Operand out = allocate(first, rows, cols, request);
  args.quantize = quantize_args(first, rows, cols, out, request);
  args.quantize.ld = -1;
  if (first.is_cpu()) {
    if (core::printing_plans()) core::print_plan(args.quantize, -1, {}, 0);
    cpu::quantize_joined(args);
    return out;
  }
  if (!core::suits_joined(args)) return copied_together();
  const at::Tensor workspace = workspace_of(core::quantize_joined_workspace_bytes(args), first);
  if (workspace.defined()) args.quantize.workspace = workspace.mutable_data_ptr();
  core::quantize_joined(args, cuda::current_stream(first));
  out.launched = true;
  return out;
}

Operand operand::make_stack(const at::Tensor& x, const QuantizeRequest& request) {
  const bool squares = request.granularity == Granularity::kBlock128x128;
  TORCH_INTERNAL_ASSERT((squares || request.granularity == Granularity::kRowwise) &&
                        request.dtype == at::kFloat8_e4m3fn);
  const bool transposed = is_stored_transposed(x);
  const at::Tensor stored = transposed ? x.transpose(1, 2) : x.contiguous();
  Operand out;
  if (squares) {
    out = squares_of_stack(stored, transposed ? request.along_rows : request.along_cols,
                           transposed ? request.along_cols : request.along_rows,
                           request.power_of_two);
    if (transposed) std::swap(out.along_cols, out.along_rows);
    return out;
  }
  Side& of_rows = transposed ? out.along_rows : out.along_cols;
  Side& of_columns = transposed ? out.along_cols : out.along_rows;
  if (transposed ? request.along_rows : request.along_cols) {
    const auto [side, amax] = rows_of_stack(stored, request);
    of_rows = side;
    out.amax = amax;
  }
  if (transposed ? request.along_cols : request.along_rows)
    of_columns = columns_of_stack(stored, request);
  return out;
}

bool operand::keeps_amax(const at::Tensor& stack) {
  return !is_stored_transposed(stack) && stack.sym_numel() > 0 &&
         stack.sym_size(2) * stack.element_size() <= core::kMaxColumnAmaxRowBytes;
}

Side operand::given(const char* op, const char* name, const at::Tensor& codes,
                    const at::Tensor& scales, Granularity granularity, int64_t rows) {
  FP8_CHECK_FP8(op, name, codes);
  FP8_CHECK_VALUE(codes.dim() == 2 && codes.size(0) >= rows && codes.size(1) % core::kPad == 0 &&
                      codes.is_contiguous(),
                  "fp8::", op, ": expected ", name, " contiguous, of at least ", rows,
                  " rows and a multiple of ", core::kPad, " columns, got shape ", codes.sym_sizes(),
                  ", strides ", codes.sym_strides());
  FP8_CHECK_TYPE(scales.scalar_type() == at::kFloat, "fp8::", op, ": expected the scale of ", name,
                 " in float32, got ", scales.scalar_type());
  FP8_CHECK_SAME_DEVICE(op, "its scale", scales, name, codes);
  FP8_CHECK_VALUE(are_scales_of(codes, scales, granularity) && scales.is_contiguous(), "fp8::", op,
                  ": expected the scale of ", name,
                  " contiguous, as its quantization lays it out for shape ", codes.sym_sizes(),
                  ", got shape ", scales.sym_sizes(), ", strides ", scales.sym_strides());
  return {codes, scales, granularity, rows};
}

at::Tensor scale_view(const Side& side, int64_t cols) {
  switch (side.granularity) {
    case Granularity::kTensorwise:
      return side.scales;
    case Granularity::kRowwise:
      return side.scales.narrow(0, 0, side.rows).unsqueeze(1);
    case Granularity::kBlock1x128:
      return side.scales.t().narrow(0, 0, side.rows);
    default:
      return side.scales.narrow(1, 0, core::blocks_of(cols));
  }
}

at::Tensor dequantize_matrix(const at::Tensor& codes, const at::Tensor& scale, at::ScalarType dtype,
                             ScaleBlock block) {
  at::Tensor out = empty_on(codes, codes.sizes(), dtype);
  if (out.numel() == 0) return out;
  const core::DequantizeArgs args{.data = codes.const_data_ptr(),
                                  .dtype = to_core(codes.scalar_type()),
                                  .rows = codes.size(0),
                                  .cols = codes.size(1),
                                  .row_stride = codes.stride(0),
                                  .col_stride = codes.stride(1),
                                  .scale = scale.const_data_ptr<float>(),
                                  .scale_row_stride = scale.stride(0),
                                  .scale_col_stride = scale.stride(1),
                                  .scale_block_rows = block.rows,
                                  .scale_block_cols = block.cols,
                                  .out = out.mutable_data_ptr(),
                                  .out_dtype = to_core(dtype)};
  FP8_RUN_PASS(dequantize, codes, args);
  return out;
}

}  // namespace fp8
