// Kernels of the quantize ops. kernel: CPU and CUDA. meta: shapes, dtypes and strides only.
// Contracts are in fp8/ops.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fp8 {

#define FP8_DECLARE_QUANTIZE_OPS                                                                   \
  std::tuple<at::Tensor, at::Tensor> quantize_tensorwise(                                          \
      const at::Tensor& x, std::optional<at::ScalarType> dtype,                                    \
      const std::optional<at::Tensor>& scale, bool power_of_two);                                  \
  std::tuple<at::Tensor, at::Tensor> quantize_rowwise(                                             \
      const at::Tensor& x, std::optional<at::ScalarType> dtype, bool power_of_two);                \
  std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_tensorwise_transpose(                    \
      const at::Tensor& x, std::optional<at::ScalarType> dtype,                                    \
      const std::optional<at::Tensor>& scale, bool power_of_two);                                  \
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_rowwise_transpose(           \
      const at::Tensor& x, std::optional<at::ScalarType> dtype, bool power_of_two);                \
  std::tuple<at::Tensor, at::Tensor> quantize_blockwise_1x128(                                     \
      const at::Tensor& x, std::optional<at::ScalarType> dtype, bool power_of_two);                \
  std::tuple<at::Tensor, at::Tensor> quantize_blockwise_128x128(                                   \
      const at::Tensor& x, std::optional<at::ScalarType> dtype, bool power_of_two);                \
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_1x128_transpose(   \
      const at::Tensor& x, std::optional<at::ScalarType> dtype, bool power_of_two);                \
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_128x128_transpose( \
      const at::Tensor& x, std::optional<at::ScalarType> dtype, bool power_of_two);                \
  at::Tensor dequantize(const at::Tensor& data, const at::Tensor& scale,                           \
                        std::optional<at::ScalarType> dtype);

namespace kernel {
FP8_DECLARE_QUANTIZE_OPS
}
namespace meta {
FP8_DECLARE_QUANTIZE_OPS
}
#undef FP8_DECLARE_QUANTIZE_OPS

}  // namespace fp8
