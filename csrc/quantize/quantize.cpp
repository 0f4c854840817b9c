// Memory and device of a quantization: allocates the padded destinations, then hands raw pointers
// to the CUDA kernels (fp8_core) or the CPU kernels, which take the same arguments.
#include "quantize/quantize.h"

#include <ATen/ATen.h>

#include "common/cuda_context.h"
#include "common/tensors.h"
#include "cpu/kernels.h"
#include "quantize/plan_text.h"
#include "quantize/whole_gpu.h"

namespace fp8 {
namespace {

QuantizedMatrix quantize_empty(const at::Tensor& x, const QuantizeRequest& request) {
  const int64_t rows = x.size(0);
  const int64_t cols = x.size(1);
  const auto fp8_options = x.options().dtype(request.dtype);
  const auto fp32 = x.options().dtype(at::kFloat);
  const bool tensorwise = request.granularity == core::Granularity::kTensorwise;
  QuantizedMatrix result;
  if (request.data) result.data = at::zeros({pad16(rows), pad16(cols)}, fp8_options);
  if (request.data_t) result.data_t = at::zeros({pad16(cols), pad16(rows)}, fp8_options);
  if (tensorwise) {
    result.scale =
        request.static_scale.defined() ? request.static_scale.clone() : at::ones({}, fp32);
    if (request.keep_amax) result.amax = at::zeros({}, fp32);
  } else {
    const auto scales = [&](int64_t storage_rows, int64_t storage_cols) {
      return at::ones(scale_sizes(request.granularity, storage_rows, storage_cols), fp32);
    };
    if (request.data) result.scale = scales(pad16(rows), pad16(cols));
    if (request.data_t) result.scale_t = scales(pad16(cols), pad16(rows));
  }
  if (request.column_sum) {
    result.column_sum = at::zeros({cols}, x.options().dtype(request.column_sum));
  }
  return result;
}

}  // namespace

at::Tensor scale_view(const at::Tensor& scale, core::Granularity granularity, int64_t rows,
                      int64_t cols) {
  switch (granularity) {
    case core::Granularity::kTensorwise:
      return scale;
    case core::Granularity::kRowwise:
      return scale.narrow(0, 0, rows).unsqueeze(1);
    case core::Granularity::kBlock1x128:
      return scale.t().narrow(0, 0, rows);
    default:
      return scale.narrow(1, 0, core::blocks_of(cols));
  }
}

QuantizedMatrix quantize_matrix(const at::Tensor& x, const QuantizeRequest& request) {
  if (x.numel() == 0) return quantize_empty(x, request);
  const int64_t rows = x.size(0);
  const int64_t cols = x.size(1);
  const bool tensorwise = request.granularity == core::Granularity::kTensorwise;
  const auto floats = [&](at::IntArrayRef sizes) { return empty_on(x, sizes, at::kFloat); };

  QuantizedMatrix result;
  core::QuantizeArgs args{.x = x.const_data_ptr(),
                          .x_dtype = to_core(x.scalar_type()),
                          .rows = rows,
                          .cols = cols,
                          .ld = leading_dim(x),
                          .dtype = to_core(request.dtype),
                          .granularity = request.granularity,
                          .power_of_two = request.power_of_two,
                          .overlaps_previous = request.overlaps_previous,
                          .whole_gpu = whole_gpu_launches(),
                          .device = x.is_cuda() ? x.device().index() : -1};
  if (request.data) {
    result.data = empty_on(x, {pad16(rows), pad16(cols)}, request.dtype);
    args.data = {result.data.mutable_data_ptr(), pad16(rows), pad16(cols)};
  }
  if (request.data_t) {
    result.data_t = empty_on(x, {pad16(cols), pad16(rows)}, request.dtype);
    args.data_t = {result.data_t.mutable_data_ptr(), pad16(cols), pad16(rows)};
  }
  if (tensorwise) {
    result.scale = floats({});
    args.scale = result.scale.mutable_data_ptr<float>();
    if (request.static_scale.defined()) {
      args.static_scale = request.static_scale.const_data_ptr<float>();
    }
    if (request.amax.defined()) args.amax = request.amax.const_data_ptr<float>();
    if (request.history != nullptr) {
      args.amax_history = request.history->words.mutable_data_ptr<float>();
      args.recomputes = request.recomputes;
      args.amax_call =
          request.history->calls.fetch_add(request.recomputes ? 0 : 1, std::memory_order_relaxed);
    }
    if (request.keep_amax) {
      result.amax = floats({});
      args.amax_out = result.amax.mutable_data_ptr<float>();
    }
  } else {
    if (request.data) {
      result.scale = floats(scale_sizes(request.granularity, pad16(rows), pad16(cols)));
      args.scale = result.scale.mutable_data_ptr<float>();
    }
    if (request.data_t) {
      result.scale_t = floats(scale_sizes(request.granularity, pad16(cols), pad16(rows)));
      args.scale_t = result.scale_t.mutable_data_ptr<float>();
    }
  }
  if (request.column_sum) {
    result.column_sum = empty_on(x, {cols}, *request.column_sum);
    args.column_sum = result.column_sum.mutable_data_ptr();
    args.column_sum_dtype = to_core(*request.column_sum);
  }

  if (x.is_cpu()) {
    if (core::printing_plans()) core::print_plan(args, -1, {}, 0);
    cpu::quantize(args);
    return result;
  }
#ifdef FP8_WITH_CUDA
  at::Tensor workspace;
  if (const size_t bytes = core::quantize_workspace_bytes(args); bytes > 0) {
    workspace = empty_on(x, {static_cast<int64_t>(bytes)}, at::kByte);
    args.workspace = workspace.mutable_data_ptr();
  }
  core::quantize(args, cuda::current_stream(x));
  result.launched = true;
  return result;
#else
  throw_no_cuda(x);
#endif
}

at::Tensor dequantize_matrix(const at::Tensor& data, const at::Tensor& scale, at::ScalarType dtype,
                             ScaleBlock block) {
  at::Tensor out = empty_on(data, data.sizes(), dtype);
  if (out.numel() == 0) return out;
  const core::DequantizeArgs args{.data = data.const_data_ptr(),
                                  .dtype = to_core(data.scalar_type()),
                                  .rows = data.size(0),
                                  .cols = data.size(1),
                                  .row_stride = data.stride(0),
                                  .col_stride = data.stride(1),
                                  .scale = scale.const_data_ptr<float>(),
                                  .scale_row_stride = scale.stride(0),
                                  .scale_col_stride = scale.stride(1),
                                  .scale_block_rows = block.rows,
                                  .scale_block_cols = block.cols,
                                  .out = out.mutable_data_ptr(),
                                  .out_dtype = to_core(dtype)};
  if (data.is_cpu()) {
    cpu::dequantize(args);
    return out;
  }
#ifdef FP8_WITH_CUDA
  core::dequantize(args, cuda::current_stream(data));
  return out;
#else
  throw_no_cuda(data);
#endif
}

}  // namespace fp8
