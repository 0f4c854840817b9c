// Kernels of the matmul ops. kernel: CPU and CUDA. meta: shapes and dtypes only. Contracts are in
// fp8/ops.h; _scaled_mm_accumulate is scaled_mm_accumulate_ on a copy of out, for
// functionalization.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fp8 {

#define FP8_DECLARE_MATMUL_OPS                                                                 \
  at::Tensor scaled_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_a,    \
                       const at::Tensor& scale_b, const std::optional<at::Tensor>& bias,       \
                       std::optional<at::ScalarType> out_dtype, bool fast_accum);              \
  at::Tensor& scaled_mm_accumulate_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, \
                                    const at::Tensor& scale_a, const at::Tensor& scale_b,      \
                                    bool fast_accum);                                          \
  at::Tensor _scaled_mm_accumulate(const at::Tensor& out, const at::Tensor& a,                 \
                                   const at::Tensor& b, const at::Tensor& scale_a,             \
                                   const at::Tensor& scale_b, bool fast_accum);

namespace kernel {
FP8_DECLARE_MATMUL_OPS
}
namespace meta {
FP8_DECLARE_MATMUL_OPS
}
#undef FP8_DECLARE_MATMUL_OPS

}  // namespace fp8
