// The public dequantize: which scale belongs to which element follows from the shapes.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/tensors.h"
#include "torch/quantize/operand.h"
#include "torch/quantize/quantize_ops.h"

namespace fp8 {
namespace {

using Dtype = std::optional<at::ScalarType>;
constexpr int64_t kBlock = core::kScaleBlock;

struct DequantizeContract {
  at::ScalarType out_dtype;
  // of data as a matrix; where one shape of scales has two readings, they mean the same
  ScaleBlock block;
};

DequantizeContract check_dequantize(const at::Tensor& data, const at::Tensor& scale, Dtype dtype) {
  FP8_CHECK_FP8("dequantize", "data", data);
  FP8_CHECK_TYPE(scale.scalar_type() == at::kFloat,
                 "fp8::dequantize: expected scale in float32, got ", scale.scalar_type());
  FP8_CHECK_SAME_DEVICE("dequantize", "scale", scale, "data", data);
  const at::ScalarType out = dtype.value_or(at::kBFloat16);
  FP8_CHECK_TYPE(is_high_precision(out),
                 "fp8::dequantize: expected dtype bfloat16, float16 or float32, got ", out);
  if (scale.dim() == 0) return {out, {}};
  bool rowwise = scale.dim() == data.dim() && data.dim() >= 1 && scale.sym_size(-1) == 1;
  for (int64_t i = 0; rowwise && i + 1 < data.dim(); ++i) {
    rowwise = scale.sym_size(i) == data.sym_size(i);
  }
  if (rowwise) return {out, {}};
  if (scale.dim() == 2 && data.dim() >= 1) {
    c10::SymInt rows = 1;
    for (int64_t i = 0; i + 1 < data.dim(); ++i) rows = rows * data.sym_size(i);
    const auto blocks = [](const c10::SymInt& extent) { return (extent + (kBlock - 1)) / kBlock; };
    if (scale.sym_size(1) == blocks(data.sym_size(-1))) {
      if (scale.sym_size(0) == rows) return {out, {.rows = 1, .cols = kBlock}};
      if (scale.sym_size(0) == blocks(rows)) return {out, {.rows = kBlock, .cols = kBlock}};
    }
  }
  FP8_CHECK_VALUE(false,
                  "fp8::dequantize: expected scale of shape [] (tensorwise), data.shape[:-1] + [1] "
                  "(rowwise), [M, ceil(K / 128)] (1x128) or [ceil(M / 128), ceil(K / 128)] "
                  "(128x128), with M the product of data.shape[:-1] and K = data.shape[-1], got "
                  "data=",
                  data.sym_sizes(), ", scale=", scale.sym_sizes());
}

}  // namespace

at::Tensor kernel::dequantize(const at::Tensor& data, const at::Tensor& scale, Dtype dtype) {
  const auto [out_dtype, block] = check_dequantize(data, scale, dtype);
  const c10::DeviceGuard guard(data.device());
  if (data.numel() == 0) return at::empty(data.sizes(), data.options().dtype(out_dtype));
  const int64_t cols = data.dim() == 0 ? 1 : data.size(-1);
  const int64_t rows = data.numel() / cols;
  const at::Tensor matrix = data.dim() == 2 ? data : data.reshape({rows, cols});
  at::Tensor scales = scale;
  if (block.cols == 1) {
    scales = scale.dim() == 0 ? scale.expand({rows, cols})
                              : scale.reshape({rows, 1}).expand({rows, cols});
  }
  return dequantize_matrix(matrix, scales, out_dtype, block).view(data.sizes());
}

at::Tensor meta::dequantize(const at::Tensor& data, const at::Tensor& scale, Dtype dtype) {
  const auto contract = check_dequantize(data, scale, dtype);
  return at::empty_symint(data.sym_sizes(), data.options().dtype(contract.out_dtype));
}

}  // namespace fp8
