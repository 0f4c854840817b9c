// Kernels of the quantize ops. kernel: CPU and CUDA. meta: shapes, dtypes and strides only.
// Contracts are in fp8/ops.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fp8 {

namespace kernel {

// data [..., K], scale []
std::tuple<at::Tensor, at::Tensor> quantize_tensorwise(
    const at::Tensor& x,  // [..., K] high precision
    std::optional<at::ScalarType> dtype,
    const std::optional<at::Tensor>& scale,  // [] fp32, a given one
    bool power_of_two);

// data [..., K], scale [..., 1]
std::tuple<at::Tensor, at::Tensor> quantize_rowwise(const at::Tensor& x,  // [..., K] high precision
                                                    std::optional<at::ScalarType> dtype,
                                                    bool power_of_two);

// data, data_t [K, M], scale []; M is the product of the leading extents
std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_tensorwise_transpose(
    const at::Tensor& x,  // [..., K] high precision
    std::optional<at::ScalarType> dtype,
    const std::optional<at::Tensor>& scale,  // [] fp32, a given one
    bool power_of_two);

// data, data_t [K, M], scale [..., 1], scale_t [K, 1]
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_rowwise_transpose(
    const at::Tensor& x,  // [..., K] high precision
    std::optional<at::ScalarType> dtype, bool power_of_two);

// data, scale [M, ceil(K / 128)]
std::tuple<at::Tensor, at::Tensor> quantize_blockwise_1x128(
    const at::Tensor& x,  // [..., K] high precision
    std::optional<at::ScalarType> dtype, bool power_of_two);

// data, scale [ceil(M / 128), ceil(K / 128)]
std::tuple<at::Tensor, at::Tensor> quantize_blockwise_128x128(
    const at::Tensor& x,  // [..., K] high precision
    std::optional<at::ScalarType> dtype, bool power_of_two);

// data, data_t [K, M], scale and scale_t in blocks of each
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_1x128_transpose(
    const at::Tensor& x,  // [..., K] high precision
    std::optional<at::ScalarType> dtype, bool power_of_two);

// the same
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_blockwise_128x128_transpose(
    const at::Tensor& x,  // [..., K] high precision
    std::optional<at::ScalarType> dtype, bool power_of_two);

at::Tensor dequantize(const at::Tensor& data,   // [..., K] FP8
                      const at::Tensor& scale,  // fp32, as one of the above
                      std::optional<at::ScalarType> dtype);

}  // namespace kernel

namespace meta {
decltype(kernel::quantize_tensorwise) quantize_tensorwise;
decltype(kernel::quantize_rowwise) quantize_rowwise;
decltype(kernel::quantize_tensorwise_transpose) quantize_tensorwise_transpose;
decltype(kernel::quantize_rowwise_transpose) quantize_rowwise_transpose;
decltype(kernel::quantize_blockwise_1x128) quantize_blockwise_1x128;
decltype(kernel::quantize_blockwise_128x128) quantize_blockwise_128x128;
decltype(kernel::quantize_blockwise_1x128_transpose) quantize_blockwise_1x128_transpose;
decltype(kernel::quantize_blockwise_128x128_transpose) quantize_blockwise_128x128_transpose;
decltype(kernel::dequantize) dequantize;
}  // namespace meta

}  // namespace fp8
