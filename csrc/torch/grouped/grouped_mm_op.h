// Kernels of the op grouped_mm. kernel: CPU and CUDA. meta: shapes and dtypes only. The contract is
// in fp8/ops.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fp8 {

namespace kernel {

at::Tensor grouped_mm(const at::Tensor& a,        // [R, K] e4m3; columns: [M, L]
                      const at::Tensor& b,        // [E, N, K] e4m3; columns: [N, L]
                      const at::Tensor& scale_a,  // fp32: [], [R, 1], in blocks; columns: [E, M]
                      const at::Tensor& scale_b,  // [], [E, N, 1], in blocks; columns: [E, N]
                      const at::Tensor& offsets,  // [E] int32
                      std::optional<at::ScalarType> out_dtype, bool fast_accum);

}  // namespace kernel

namespace meta {
decltype(kernel::grouped_mm) grouped_mm;
}  // namespace meta

}  // namespace fp8
