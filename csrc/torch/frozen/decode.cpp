// linear_frozen of few rows on compute capability 9.0 by core::decode: in one launch that quantizes
// x too, or, of more rows, in two that overlap.
#include <ATen/ATen.h>

#include "fp8/core_decode.h"
#include "torch/common/cuda_context.h"
#include "torch/common/tensors.h"
#include "torch/frozen/frozen.h"
#include "torch/quantize/memory.h"

namespace fp8 {

using core::Granularity;

std::optional<at::Tensor> frozen::decode(const at::Tensor& x, const at::Tensor& weight,
                                         const at::Tensor& weight_scale, const Form& form,
                                         const OptionalTensor& bias,
                                         const OptionalTensor& input_scale, bool power_of_two) {
  const int64_t k = weight.size(1);
  const int64_t m = x.numel() / k;
  if (!x.is_cuda() || !core::has_cuda() || m > core::kMaxDecodeRows) return std::nullopt;
  // One scale that is not given would depend on all rows.
  if (form.input == Granularity::kTensorwise && !input_scale) return std::nullopt;
  core::DecodeArgs args{.m = m,
                        .n = weight.size(0),
                        .k = k,
                        .x_dtype = to_core(x.scalar_type()),
                        .granularity = form.input,
                        .power_of_two = power_of_two,
                        .device = x.device().index()};
  args.weight_scale = weight_scale.const_data_ptr<float>();
  if (form.weight == Granularity::kBlock128x128) {
    args.weight_scale_row_stride = weight_scale.stride(0);
    args.weight_scale_col_stride = weight_scale.stride(1);
  } else if (weight_scale.numel() > 1) {  // [N], [N, 1] or [1, N]
    const bool is_row = weight_scale.dim() == 2 && weight_scale.size(0) == 1;
    args.weight_scale_row_stride = weight_scale.stride(is_row ? 1 : 0);
  }
  if (!core::suits_decode(args)) return std::nullopt;
  memory::drop_gone_inputs();

  const at::Tensor matrix = as_matrix(x);
  args.x = matrix.const_data_ptr();
  args.ldx = leading_dim(matrix);
  if (input_scale) args.input_scale = input_scale->const_data_ptr<float>();
  const at::Tensor codes = ready_codes(weight, args.n);
  args.weight = codes.const_data_ptr();
  args.ldw = codes.stride(0);
  const at::Tensor biases = bias ? bias->contiguous() : at::Tensor();
  if (bias) args.bias = biases.const_data_ptr();
  at::Tensor workspace;
  if (const size_t bytes = core::decode_workspace_bytes(args)) {
    workspace = empty_on(x, {static_cast<int64_t>(bytes)}, at::kByte);
    args.workspace = workspace.mutable_data_ptr();
  }
  at::Tensor y = empty_on(x, {m, args.n}, x.scalar_type());
  args.y = y.mutable_data_ptr();
  core::decode(args, cuda::current_stream(x));
  return y;
}

}  // namespace fp8
