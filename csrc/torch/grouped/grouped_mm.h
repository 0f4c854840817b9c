// Matmuls over groups of rows whose extents only the device knows.
#pragma once

#include "torch/grouped/operands.h"

namespace fp8::grouped {

// y[r] = a[r] * b[group of r]^T * scales: codes of a [R, K], of b [groups, N, K] -> [R, N]. Rows
// past the last offset are not written. Scales: both [] (tensorwise); [R] and [groups, N]
// (rowwise); or, in blocks, a's 1x128 [ceil(K / 128), >= R] and b's 128x128 [groups, ceil(N / 128),
// >= ceil(K / 128)], the matrices of the latter without gaps.
at::Tensor multiply_rows(const Side& a, const Side& b, const at::Tensor& offsets,
                         at::ScalarType out_dtype, bool fast_accum);

// out[g] = a[:, columns of g] * b[:, columns of g]^T * scales: codes [N, L] and [K, L], scales
// [groups, N] and [groups, K] -> [groups, N, K]. Groups hold at least 32 columns, zeros where there
// is nothing.
at::Tensor multiply_columns(const Side& a, const Side& b, const at::Tensor& padded_offsets,
                            at::ScalarType out_dtype, bool fast_accum);

// The same added to `out`, or written there: [groups, N, K] fp32, contiguous. False where there is
// no kernel that does it, and nothing was done.
bool add_columns(const Side& a, const Side& b, const at::Tensor& padded_offsets,
                 const at::Tensor& out, bool fast_accum, bool overwrite);

// out[g] = a[rows of g]^T * b[rows of g] in high precision: a [R, N], b [R, K] -> [groups, N, K].
// On a GPU the products are of bf16 values, and rounded to bf16, whatever the dtypes.
at::Tensor multiply_high_precision(const at::Tensor& a, const at::Tensor& b,
                                   const at::Tensor& offsets, at::ScalarType out_dtype);

}  // namespace fp8::grouped
