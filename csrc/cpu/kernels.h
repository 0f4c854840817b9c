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

}  // namespace fp8::cpu
