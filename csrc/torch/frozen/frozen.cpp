// linear_frozen: a linear layer on codes and scales that are given, and its input gradient on the
// same codes.
//
//   y  = x W^T + b     x quantized as the weight's scales ask for; the weight is read where it lies
//   dx = dy W          dy times the scales of W's rows, quantized with a scale for each row, times
//                      the transposed codes; with 128x128 blocks dy in blocks of 1x128, times the
//                      transposed codes with their transposed scales. W is not quantized again.
//
// Of few rows y may be core::decode's (decode.cpp); all else is made of operands and matmul.
//
// What cuBLASLt wants and a checkpoint has not (extents in 16s, rows of block scales in fours, a
// scale for each row where the other operand has them) is made in the call; of the weight itself
// nothing is copied where N and K are multiples of 16.
#include "torch/frozen/frozen.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/tensors.h"
#include "torch/matmul/batch_invariant.h"
#include "torch/matmul/matmul.h"
#include "torch/quantize/memory.h"
#include "torch/quantize/operand.h"

namespace fp8 {
namespace {

using core::Granularity;
using frozen::OptionalTensor;

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

// Rows that the codes of a product's second operand must have (torch/matmul/matmul.h; eights for
// the one of batch_invariant.h).
int64_t code_rows(int64_t rows, at::ScalarType out_dtype, bool blocks, bool invariant) {
  const auto bytes = static_cast<int64_t>(c10::elementSize(out_dtype));
  const bool whole = rows * bytes % 16 == 0 && (rows % 8 == 0 || !invariant);
  return !blocks && whole ? rows : pad16(rows);
}

// On 16 bytes, as cuBLASLt wants each scale.
at::Tensor aligned(const at::Tensor& scales) {
  return on_16_bytes(scales) ? scales : scales.clone();
}

// A scale for each of `rows` rows of codes, from one for all or one for each of the first.
at::Tensor row_scales(const at::Tensor& scale, int64_t rows) {
  if (scale.numel() == 1 && rows != 1) {
    return scale.reshape({1}).expand({rows}).contiguous();
  }
  const at::Tensor flat = scale.reshape({-1}).contiguous();
  return aligned(flat.numel() == rows ? flat
                                      : at::constant_pad_nd(flat, {0, rows - flat.numel()}, 1));
}

// [blocks of rows, blocks of cols] in rows of a multiple of four. What is added is not read.
at::Tensor square_scales(const at::Tensor& scale) {
  const int64_t cols = scale.size(1);
  const int64_t ld = (cols + 3) / 4 * 4;
  if (ld == cols) return aligned(scale.contiguous());
  return at::constant_pad_nd(scale, {0, ld - cols}, 1);
}

// The weight as fprop reads it, for x with scales of `input`.
Side weight_side(const at::Tensor& weight, const at::Tensor& scale, const frozen::Form& form,
                 at::ScalarType out_dtype, bool invariant) {
  const bool blocks = form.weight == Granularity::kBlock128x128;
  const int64_t rows = code_rows(weight.size(0), out_dtype, blocks, invariant);
  Side side{.codes = frozen::ready_codes(weight, rows), .rows = weight.size(0)};
  if (blocks) {
    side.scales = square_scales(scale);
    side.granularity = Granularity::kBlock128x128;
  } else if (form.weight == Granularity::kTensorwise && form.input == Granularity::kTensorwise) {
    side.scales = aligned(scale.reshape({}));
  } else {
    side.scales = row_scales(scale, rows);
    side.granularity = Granularity::kRowwise;
  }
  return side;
}

// The weight as dgrad reads it: the codes transposed, as bytes; where dy has taken the scales of
// W's rows, a scale of one.
Side weight_t_side(const at::Tensor& weight, const at::Tensor& scale, Granularity granularity,
                   at::ScalarType out_dtype) {
  const bool blocks = granularity == Granularity::kBlock128x128;
  const int64_t k = weight.size(1);
  const int64_t rows = code_rows(k, out_dtype, blocks, /*invariant=*/false);
  Side side{.codes = frozen::ready_codes(weight.t(), rows), .rows = k};
  if (blocks) {
    side.scales = square_scales(scale.t());
    side.granularity = Granularity::kBlock128x128;
  } else {
    side.scales = granularity == Granularity::kTensorwise ? row_scales(scale, rows)
                                                          : at::ones({rows}, scale.options());
    side.granularity = Granularity::kRowwise;
  }
  return side;
}

Side input_side(const at::Tensor& x, const frozen::Form& form, const OptionalTensor& input_scale,
                bool power_of_two) {
  const Operand made = operand::remembered_input(
      x, {.granularity = form.input,
          .power_of_two = power_of_two,
          .scaling = input_scale ? Scaling::given(input_scale->reshape({})) : Scaling::dynamic()});
  Side side = made.along_cols;
  if (form.input == Granularity::kTensorwise && form.weight == Granularity::kRowwise) {
    side.scales = row_scales(side.scales, side.codes.size(0));
    side.granularity = Granularity::kRowwise;
  }
  return side;
}

// dy times the scale of each of W's rows. Gradients in fp16 may be as small as that format goes:
// in fp32 then.
at::Tensor times_row_scales(const at::Tensor& dy, const at::Tensor& scale) {
  const at::ScalarType dtype = dy.scalar_type() == at::kHalf ? at::kFloat : dy.scalar_type();
  at::Tensor out = empty_on(dy, dy.sizes(), dtype);
  return at::mul_out(out, dy, scale.reshape({1, -1}));
}

}  // namespace

at::Tensor frozen::ready_codes(const at::Tensor& codes, int64_t rows) {
  const int64_t k = pad16(codes.size(1));
  if (rows == codes.size(0) && k == codes.size(1) && codes.is_contiguous() && on_16_bytes(codes)) {
    return codes;
  }
  const at::Tensor bytes = codes.view(at::kByte);
  const bool pads = rows != codes.size(0) || k != codes.size(1);
  at::Tensor ready =
      pads ? at::zeros({rows, k}, bytes.options()) : empty_on(codes, {rows, k}, at::kByte);
  ready.narrow(0, 0, codes.size(0)).narrow(1, 0, codes.size(1)).copy_(bytes);
  return ready.view(codes.scalar_type());
}

at::Tensor kernel::linear_frozen(const at::Tensor& x, const at::Tensor& weight,
                                 const at::Tensor& weight_scale, const OptionalTensor& bias,
                                 const OptionalTensor& input_scale,
                                 std::optional<std::string_view> input_granularity,
                                 bool power_of_two, bool decode) {
  const frozen::Form form =
      frozen::checked_form(x, weight, weight_scale, bias, input_scale, input_granularity);
  const c10::DeviceGuard guard(x.device());
  const std::vector<int64_t> shape = with_last(x.sizes(), weight.size(0));
  if (x.numel() == 0 || weight.size(0) == 0) {
    at::Tensor y = at::zeros(shape, x.options());
    return bias ? y.add_(*bias) : y;
  }
  const bool invariant = batch_invariant::enabled();
  if (decode && !invariant) {
    if (const std::optional<at::Tensor> y =
            frozen::decode(x, weight, weight_scale, form, bias, input_scale, power_of_two)) {
      return x.dim() == 2 ? *y : y->view(shape);
    }
  }
  if (invariant && form.input == Granularity::kTensorwise) {
    batch_invariant::check_frozen(input_scale.has_value());
  }
  const Side qx = input_side(x, form, input_scale, power_of_two);
  const Side qw = weight_side(weight, weight_scale, form, x.scalar_type(), invariant);
  const at::Tensor y = matmul(qx, qw,
                              {.dtype = x.scalar_type(),
                               .bias = bias.value_or(at::Tensor()),
                               .batch_invariant = invariant});
  return x.dim() == 2 ? y : y.view(shape);
}

at::Tensor kernel::_linear_frozen_backward(const at::Tensor& dy, const at::Tensor& weight,
                                           const at::Tensor& weight_scale, bool is_blocks,
                                           bool power_of_two) {
  const Granularity granularity =
      frozen::weight_granularity("_linear_frozen_backward", weight, weight_scale, is_blocks);
  const c10::DeviceGuard guard(dy.device());
  const std::vector<int64_t> shape = with_last(dy.sizes(), weight.size(1));
  if (dy.numel() == 0 || weight.size(1) == 0) return at::zeros(shape, dy.options());
  memory::drop_inputs();
  const at::Tensor matrix = as_matrix(dy);
  const bool rows = granularity == Granularity::kRowwise;
  const bool blocks = granularity == Granularity::kBlock128x128;
  const Operand qdy =
      operand::make(rows ? times_row_scales(matrix, weight_scale) : matrix,
                    {.granularity = blocks ? Granularity::kBlock1x128 : Granularity::kRowwise,
                     .power_of_two = power_of_two});
  const at::Tensor dx =
      matmul(qdy.along_cols, weight_t_side(weight, weight_scale, granularity, dy.scalar_type()),
             {.dtype = dy.scalar_type(), .fast_accum = false});
  return dy.dim() == 2 ? dx : dx.view(shape);
}

at::Tensor meta::linear_frozen(const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& weight_scale, const OptionalTensor& bias,
                               const OptionalTensor& input_scale,
                               std::optional<std::string_view> input_granularity,
                               bool /*power_of_two*/, bool /*decode*/) {
  frozen::checked_form(x, weight, weight_scale, bias, input_scale, input_granularity);
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end());
  shape.back() = weight.sym_size(0);
  return at::empty_symint(shape, x.options());
}

at::Tensor meta::_linear_frozen_backward(const at::Tensor& dy, const at::Tensor& weight,
                                         const at::Tensor& weight_scale, bool blocks,
                                         bool /*power_of_two*/) {
  frozen::weight_granularity("_linear_frozen_backward", weight, weight_scale, blocks);
  c10::SymDimVector shape(dy.sym_sizes().begin(), dy.sym_sizes().end());
  shape.back() = weight.sym_size(1);
  return at::empty_symint(shape, dy.options());
}

}  // namespace fp8
