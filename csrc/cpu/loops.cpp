#include "cpu/loops.h"

#include <c10/util/Half.h>

#include <algorithm>

#include "host/formats.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FP8_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define FP8_CLONES
#endif

namespace fp8::cpu {
namespace {

FP8_CLONES void widen_bf16(const uint16_t* x, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint32_t>(x[i]) << 16;
}

FP8_CLONES void widen_fp16(const uint16_t* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = c10::detail::fp16_ieee_to_fp32_value(x[i]);
}

FP8_CLONES void encode_e4m3(const float* x, float multiplier, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = fp8::encode<E4M3>(x[i] * multiplier);
}

FP8_CLONES void encode_e5m2(const float* x, float multiplier, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = fp8::encode<E5M2>(x[i] * multiplier);
}

FP8_CLONES void encode_columns_e4m3(const float* x, const float* m, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = fp8::encode<E4M3>(x[i] * m[i]);
}

FP8_CLONES void encode_columns_e5m2(const float* x, const float* m, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = fp8::encode<E5M2>(x[i] * m[i]);
}

FP8_CLONES uint32_t max_magnitude(const float* x, int64_t count) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits = std::max(bits, magnitude_bits(x[i]));
  return bits;
}

FP8_CLONES uint32_t max_finite_magnitude(const float* x, int64_t count) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t found = magnitude_bits(x[i]);
    bits = std::max(bits, found < kExponentBits ? found : 0U);
  }
  return bits;
}

FP8_CLONES uint32_t fold(const uint32_t* x, int64_t count) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t word = (x[i] ^ (x[i] >> 15)) * 0x2C1B3C6DU;  // else twice x could give x's sum
    sum += (word ^ (word >> 13)) * (2U * static_cast<uint32_t>(i) + 0x9E3779B1U);
  }
  return sum;
}

FP8_CLONES void max_magnitude_columns(const float* x, int64_t count, uint32_t* bits) {
  for (int64_t i = 0; i < count; ++i) bits[i] = std::max(bits[i], magnitude_bits(x[i]));
}

FP8_CLONES void mark_infinite(uint32_t* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] |= (x[i] & 0x7FFFFFFFU) == kExponentBits ? 1U : 0U;
}

FP8_CLONES void add_columns(const float* x, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

FP8_CLONES void products(const float* x, const float* w, int64_t count, float* out) {
  float sums[kProductTile] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int j = 0; j < kProductTile; ++j) sums[j] += x[i] * w[i * kProductTile + j];
  }
  for (int j = 0; j < kProductTile; ++j) out[j] += sums[j];
}

}  // namespace

void widen(const void* x, core::Dtype dtype, int64_t count, float* out) {
  switch (dtype) {
    case core::Dtype::kBFloat16:
      return widen_bf16(static_cast<const uint16_t*>(x), count, reinterpret_cast<uint32_t*>(out));
    case core::Dtype::kFloat16:
      return widen_fp16(static_cast<const uint16_t*>(x), count, out);
    default:
      std::copy_n(static_cast<const float*>(x), count, out);
  }
}

uint32_t amax_bits(const float* x, int64_t count) { return max_magnitude(x, count); }

uint32_t finite_amax_bits(const float* x, int64_t count) { return max_finite_magnitude(x, count); }

uint32_t fold_bits(const float* x, int64_t count) {
  return fold(reinterpret_cast<const uint32_t*>(x), count);
}

void amax_update(const float* x, int64_t count, uint32_t* column_bits) {
  max_magnitude_columns(x, count, column_bits);
}

void infinite_to_nan(float* x, int64_t count) {
  mark_infinite(reinterpret_cast<uint32_t*>(x), count);
}

void add_to(const float* x, int64_t count, float* column_sum) { add_columns(x, count, column_sum); }

void add_products(const float* x, const float* w, int64_t count, float* out) {
  products(x, w, count, out);
}

void encode(const float* x, float multiplier, core::Dtype dtype, int64_t count, uint8_t* out) {
  dtype == core::Dtype::kE4M3 ? encode_e4m3(x, multiplier, count, out)
                              : encode_e5m2(x, multiplier, count, out);
}

void encode_columns(const float* x, const float* multipliers, core::Dtype dtype, int64_t count,
                    uint8_t* out) {
  dtype == core::Dtype::kE4M3 ? encode_columns_e4m3(x, multipliers, count, out)
                              : encode_columns_e5m2(x, multipliers, count, out);
}

}  // namespace fp8::cpu
