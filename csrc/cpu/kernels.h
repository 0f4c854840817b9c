// CPU kernels: the reference, and what runs where there is no GPU. Same arguments as fp8_core's,
// same bits.
#pragma once

#include "fp8/core.h"
#include "fp8/core_joined.h"

namespace fp8::cpu {

void quantize(const core::QuantizeArgs& args);
void quantize_blockwise(const core::QuantizeArgs& args);  // quantize() for blocks, but column sums
void quantize_joined(const core::JoinedArgs& args);       // copied together first
void dequantize(const core::DequantizeArgs& args);

// codes [rows, cols] with `ld` bytes a row -> floats [rows, cols] contiguous, unscaled
void decode(const void* codes, core::Dtype dtype, int64_t rows, int64_t cols, int64_t ld,
            float* out);

// out += a b^T: a [m, k], b [n, k], out [m, n] contiguous. Of an element the products of 128
// columns are added in their order, and such sums in theirs: neither m nor n changes its bits.
void multiply(const float* a, const float* b, int64_t m, int64_t n, int64_t k, float* out);

}  // namespace fp8::cpu
