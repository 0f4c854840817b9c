// Kernels of the matmul ops. kernel: CPU and CUDA. meta: shapes and dtypes only. Contracts are in
// fp8/ops.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fp8 {

namespace kernel {

at::Tensor scaled_mm(const at::Tensor& a,                    // [M, K] FP8
                     const at::Tensor& b,                    // [N, K] FP8
                     const at::Tensor& scale_a,              // fp32: [], [M, 1] or in blocks
                     const at::Tensor& scale_b,              // the same with N
                     const std::optional<at::Tensor>& bias,  // [N]
                     std::optional<at::ScalarType> out_dtype, bool fast_accum);

at::Tensor& scaled_mm_accumulate_(at::Tensor& out,            // [M, N]
                                  const at::Tensor& a,        // [M, K] FP8
                                  const at::Tensor& b,        // [N, K] FP8
                                  const at::Tensor& scale_a,  // as scaled_mm's
                                  const at::Tensor& scale_b, bool fast_accum);

// scaled_mm_accumulate_ on a copy of out, for functionalization.
at::Tensor _scaled_mm_accumulate(const at::Tensor& out,      // [M, N]
                                 const at::Tensor& a,        // [M, K] FP8
                                 const at::Tensor& b,        // [N, K] FP8
                                 const at::Tensor& scale_a,  // as scaled_mm's
                                 const at::Tensor& scale_b, bool fast_accum);

}  // namespace kernel

namespace meta {
decltype(kernel::scaled_mm) scaled_mm;
decltype(kernel::scaled_mm_accumulate_) scaled_mm_accumulate_;
decltype(kernel::_scaled_mm_accumulate) _scaled_mm_accumulate;
}  // namespace meta

}  // namespace fp8
