// linear_frozen of few rows on compute capability 9.0, where core::decode is faster than a product
// by cuBLASLt: in one launch that quantizes x too, or, of more rows, in two that overlap.
#include <ATen/ATen.h>

#include "fp8/core_decode.h"
#include "torch/common/cuda_context.h"
#include "torch/common/tensors.h"
#include "torch/frozen/frozen.h"
#include "torch/quantize/memory.h"
#include "torch/quantize/operand.h"

namespace fp8 {

using core::DecodeInput;
using core::Granularity;

std::optional<at::Tensor> frozen::decode(const at::Tensor& x, const at::Tensor& weight,
                                         const at::Tensor& weight_scale, const Form& form,
                                         const OptionalTensor& bias,
                                         const OptionalTensor& input_scale, bool power_of_two) {
  const int64_t k = weight.size(1);
  const int64_t m = x.numel() / k;
  if (!x.is_cuda() || !core::has_cuda() || m > core::kMaxDecodeRows) return std::nullopt;
  const bool one_scale = form.input == Granularity::kTensorwise;
  if (one_scale && !input_scale) return std::nullopt;  // it would depend on all rows
  core::DecodeArgs args{.m = m,
                        .n = weight.size(0),
                        .k = k,
                        .x_dtype = to_core(x.scalar_type()),
                        .power_of_two = power_of_two,
                        .granularity = form.input,
                        .device = x.device().index()};
  const DecodeInput input = core::decode_input(args);
  if (input == DecodeInput::kNone) return std::nullopt;

  const at::Tensor codes = ready_codes(weight, weight.size(0));
  args.weight = codes.const_data_ptr();
  args.ldw = codes.stride(0);
  args.weight_scale = weight_scale.const_data_ptr<float>();
  if (form.weight == Granularity::kBlock128x128) {
    args.weight_scale_row_stride = weight_scale.stride(0);
    args.weight_scale_col_stride = weight_scale.stride(1);
  } else if (weight_scale.numel() > 1) {  // [N], [N, 1] or [1, N]
    const bool is_row = weight_scale.dim() == 2 && weight_scale.size(0) == 1;
    args.weight_scale_row_stride = weight_scale.stride(is_row ? 1 : 0);
  }
  const at::Tensor biases = bias ? bias->contiguous() : at::Tensor();
  if (bias) args.bias = biases.const_data_ptr();

  // As long as the launch is in flight, its stream keeps what these hold from being written.
  at::Tensor matrix;
  Side qx;
  if (input == DecodeInput::kValues) {
    memory::drop_gone_inputs();
    matrix = as_matrix(x);
    args.x = matrix.const_data_ptr();
    args.ldx = leading_dim(matrix);
    if (input_scale) args.input_scale = input_scale->const_data_ptr<float>();
  } else {
    const Operand made = operand::remembered_input(
        x,
        {.granularity = form.input,
         .power_of_two = power_of_two,
         .scaling = input_scale ? Scaling::given(input_scale->reshape({})) : Scaling::dynamic()});
    qx = made.along_cols;
    args.x_codes = qx.codes.const_data_ptr();
    args.ld_codes = qx.codes.stride(0);
    args.x_scale = qx.scales.const_data_ptr<float>();
    args.scale_rows = qx.codes.size(0);
    // The quantization is an ordinary launch, so nothing else is in flight, and it writes no
    // weight.
    args.pdl = made.launched;
  }
  at::Tensor y = empty_on(x, {m, args.n}, x.scalar_type());
  args.y = y.mutable_data_ptr();
  core::decode(args, cuda::current_stream(x));
  return y;
}

}  // namespace fp8
