// The innermost CPU loops, over contiguous floats. Compiled for several x86-64 levels and chosen at
// load time; -ffp-contract=off keeps their bits equal on all of them.
#pragma once

#include <cstdint>

#include "fp8/core.h"

namespace fp8::cpu {

void widen(const void* x, core::Dtype dtype, int64_t count, float* out);
uint32_t amax_bits(const float* x, int64_t count);
// Of the finite values; and a word that changes, as a rule, with any value.
uint32_t finite_amax_bits(const float* x, int64_t count);
uint32_t fold_bits(const float* x, int64_t count);
void amax_update(const float* x, int64_t count, uint32_t* column_bits);
void infinite_to_nan(float* x, int64_t count);
void add_to(const float* x, int64_t count, float* column_sum);
// codes of x * multiplier, and of x[i] * multipliers[i]
void encode(const float* x, float multiplier, core::Dtype dtype, int64_t count, uint8_t* out);
void encode_columns(const float* x, const float* multipliers, core::Dtype dtype, int64_t count,
                    uint8_t* out);

// out[j] += the sum over i, in that order, of x[i] * w[i * kProductTile + j], j < kProductTile
inline constexpr int kProductTile = 32;
void add_products(const float* x, const float* w, int64_t count, float* out);

}  // namespace fp8::cpu
