// The two FP8 formats in plain C++: limits, encoding, decoding, and the scale of a scaling group.
// One definition for the CPU kernels, the tests and (through the constants) the CUDA kernels.
//
// The encoder is branch-free so that compilers vectorize a loop over it. It rounds to nearest even
// and saturates, as the hardware's cvt.rn.satfinite does: NaN becomes 0x7F (the sign is dropped),
// Inf the largest finite code.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <variant>

#include "fp8/core.h"

#ifdef __CUDACC__
#define FP8_HOST_DEVICE __host__ __device__
#else
#define FP8_HOST_DEVICE
#endif

namespace fp8 {

struct E4M3 {
  static constexpr core::Dtype kDtype = core::Dtype::kE4M3;
  static constexpr int kMantissaBits = 3;
  static constexpr int kExponentBias = 7;
  static constexpr float kMax = 448.0F;
};

struct E5M2 {
  static constexpr core::Dtype kDtype = core::Dtype::kE5M2;
  static constexpr int kMantissaBits = 2;
  static constexpr int kExponentBias = 15;
  static constexpr float kMax = 57344.0F;
};

inline constexpr uint8_t kNanCode = 0x7F;

constexpr bool is_blockwise(core::Granularity granularity) {
  return granularity == core::Granularity::kBlock1x128 ||
         granularity == core::Granularity::kBlock128x128;
}

// The scale is that of earlier calls, as a rule, so that x is read once.
constexpr bool is_delayed(const core::QuantizeArgs& args) {
  return std::holds_alternative<core::Delayed>(args.scaling) && args.column_sum == nullptr;
}

constexpr bool takes_own_amax(const core::QuantizeArgs& args) {
  return std::holds_alternative<core::OwnAmax>(args.scaling);
}

// Whether a tensor of amax `own` may be cast with the scale of the amax `used`: see fp8/core.h.
FP8_HOST_DEVICE constexpr bool suits(float used, float own, core::Dtype dtype) {
  const float slack = dtype == core::Dtype::kE5M2 ? core::kAmaxSlackE5M2 : core::kAmaxSlack;
  return own == 0.0F ? used <= FLT_MAX : own <= used && used <= slack * own;
}

// An amax, as bits, with the margin that a window's has.
FP8_HOST_DEVICE inline uint32_t with_margin(uint32_t amax_bits) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(fminf(__uint_as_float(amax_bits) * core::kAmaxMargin, FLT_MAX));
#else
  const float amax = std::min(std::bit_cast<float>(amax_bits) * core::kAmaxMargin, FLT_MAX);
  return std::bit_cast<uint32_t>(amax);
#endif
}

// Words of a history: a ring of records, of which record i lies at i % kAmaxRecords, first all of
// the calls' own amaxes, then what was used, then fingerprints; the number of records made so far,
// modulo 2^32 (where it is 0 again, the history begins anew); the next cast's guess, or 0.
inline constexpr int kHistoryUsed = core::kAmaxRecords;
inline constexpr int kHistoryFingerprint = 2 * core::kAmaxRecords;
inline constexpr int kHistoryCount = 3 * core::kAmaxRecords;
inline constexpr int kHistoryGuess = kHistoryCount + 1;
static_assert(core::kAmaxHistorySize == kHistoryGuess + 1);

// The newest records, in which a call looks for its x.
inline constexpr uint32_t kAmaxSearched = core::kAmaxRecords - 1;

// Of a record whose call did not look at x but for its amax; no x has it.
inline constexpr uint32_t kNoFingerprint = 0;
FP8_HOST_DEVICE constexpr uint32_t fingerprint_of(uint32_t sum) {
  return sum == kNoFingerprint ? 1 : sum;
}

// Mixes the bits of a word (the finalizer of MurmurHash3): a fingerprint is a sum of these, so that
// it does not depend on the order in which its parts are added.
FP8_HOST_DEVICE constexpr uint32_t mix_bits(uint32_t word) {
  word ^= word >> 16;
  word *= 0x85EBCA6BU;
  word ^= word >> 13;
  word *= 0xC2B2AE35U;
  return word ^ (word >> 16);
}

constexpr bool is_fp8(core::Dtype dtype) {
  return dtype == core::Dtype::kE4M3 || dtype == core::Dtype::kE5M2;
}

constexpr float fp8_max(core::Dtype dtype) {
  return dtype == core::Dtype::kE4M3 ? E4M3::kMax : E5M2::kMax;
}

constexpr int64_t dtype_bytes(core::Dtype dtype) {
  switch (dtype) {
    case core::Dtype::kFloat32:
      return 4;
    case core::Dtype::kBFloat16:
    case core::Dtype::kFloat16:
      return 2;
    default:
      return 1;
  }
}

constexpr const char* dtype_name(core::Dtype dtype) {
  switch (dtype) {
    case core::Dtype::kFloat32:
      return "float32";
    case core::Dtype::kBFloat16:
      return "bfloat16";
    case core::Dtype::kFloat16:
      return "float16";
    case core::Dtype::kE4M3:
      return "float8_e4m3fn";
    case core::Dtype::kE5M2:
      return "float8_e5m2";
  }
  return "unknown";
}

template <typename Format>
inline uint8_t encode(float value) {
  constexpr int kShift = 23 - Format::kMantissaBits;
  constexpr uint32_t kRebias = static_cast<uint32_t>(127 - Format::kExponentBias)
                               << Format::kMantissaBits;
  // The smallest normal, and a float whose ulp is the format's smallest subnormal: adding it rounds
  // there.
  constexpr uint32_t kMinNormal = static_cast<uint32_t>(128 - Format::kExponentBias) << 23;
  constexpr uint32_t kSubnormalMagic = static_cast<uint32_t>(128 - Format::kExponentBias + kShift)
                                       << 23;

  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  const uint32_t sign = (bits >> 24) & 0x80U;
  const uint32_t clamped = std::min(magnitude, std::bit_cast<uint32_t>(Format::kMax));
  const uint32_t normal =
      ((clamped + ((1U << (kShift - 1)) - 1) + ((clamped >> kShift) & 1U)) >> kShift) - kRebias;
  const float shifted = std::bit_cast<float>(clamped) + std::bit_cast<float>(kSubnormalMagic);
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) - kSubnormalMagic;
  const uint32_t code = (clamped < kMinNormal ? subnormal : normal) | sign;
  return static_cast<uint8_t>(magnitude > 0x7F800000U ? kNanCode : code);
}

template <typename Format>
inline float decode(uint8_t code) {
  const int exponent = (code & 0x7F) >> Format::kMantissaBits;
  const int mantissa = code & ((1 << Format::kMantissaBits) - 1);
  const int exponent_max = (1 << (7 - Format::kMantissaBits)) - 1;
  const float sign = (code & 0x80) != 0 ? -1.0F : 1.0F;
  if constexpr (Format::kMantissaBits == 3) {
    if ((code & 0x7F) == 0x7F) return std::numeric_limits<float>::quiet_NaN();
  } else {
    if (exponent == exponent_max) {
      return mantissa == 0 ? sign * std::numeric_limits<float>::infinity()
                           : std::numeric_limits<float>::quiet_NaN();
    }
  }
  if (exponent == 0) {
    return sign * std::ldexp(static_cast<float>(mantissa),
                             1 - Format::kExponentBias - Format::kMantissaBits);
  }
  return sign * std::ldexp(1.0F + std::ldexp(static_cast<float>(mantissa), -Format::kMantissaBits),
                           exponent - Format::kExponentBias);
}

// A multiplier rounded down to a power of two, by its bits: the exponent stays, the mantissa goes.
// Exact where the exponent says it all, for normal numbers and 0, and multipliers are no others:
// the smallest of a finite amax is 448 / FLT_MAX, above 2^-120. NaN stays NaN.
inline constexpr uint32_t kExponentBits = 0x7F800000U;

inline float round_to_power_of_two(float multiplier) {
  const auto bits = std::bit_cast<uint32_t>(multiplier);
  return std::isnan(multiplier) ? multiplier : std::bit_cast<float>(bits & kExponentBits);
}

// The numerics contract's first division; scale is 1 / multiplier. amax 0 gives 1, an infinite
// quotient FLT_MAX (2^127 as a power of two), Inf gives 0, NaN stays NaN.
inline float quant_multiplier(float amax, float format_max, bool power_of_two = false) {
  if (amax == 0.0F) return 1.0F;
  float quotient = format_max / amax;
  if (std::isinf(quotient)) quotient = std::numeric_limits<float>::max();
  return power_of_two ? round_to_power_of_two(quotient) : quotient;
}

// amax is kept as the bits of a non-negative float while it is being reduced: unsigned order is
// then the order of the values, with NaN above everything, so that a plain integer max propagates
// NaN.
inline uint32_t magnitude_bits(float value) { return std::bit_cast<uint32_t>(value) & 0x7FFFFFFFU; }

}  // namespace fp8
