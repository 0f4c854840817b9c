// The FP8 formats against their definition: every code, every rounding boundary.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "host/formats.h"

namespace {

using fp8::E4M3;
using fp8::E5M2;

// All finite non-negative values in code order, from sign, exponent and mantissa as the OCP FP8
// paper defines them.
std::vector<float> finite_values(int mantissa_bits, int bias, int codes) {
  std::vector<float> values;
  for (int code = 0; code < codes; ++code) {
    const int exponent = code >> mantissa_bits;
    const double fraction =
        static_cast<double>(code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits);
    values.push_back(static_cast<float>(exponent == 0
                                            ? fraction * std::pow(2.0, 1 - bias)
                                            : (1 + fraction) * std::pow(2.0, exponent - bias)));
  }
  return values;
}

template <typename Format>
void check_rounding(const std::vector<float>& values) {
  for (size_t code = 0; code < values.size(); ++code) {
    const float value = values[code];
    REQUIRE(fp8::decode<Format>(static_cast<uint8_t>(code)) == value);
    REQUIRE(fp8::encode<Format>(value) == code);
    REQUIRE(fp8::encode<Format>(-value) == (code | 0x80));
    if (code + 1 == values.size()) break;
    // Halfway goes to the even code; a step to either side goes to the nearer one.
    const float middle = value + (values[code + 1] - value) / 2;
    REQUIRE(fp8::encode<Format>(middle) == (code % 2 == 0 ? code : code + 1));
    REQUIRE(fp8::encode<Format>(std::nextafter(middle, 0.0F)) == code);
    REQUIRE(fp8::encode<Format>(std::nextafter(middle, 1e30F)) == code + 1);
  }
}

template <typename Format>
void check_special(uint8_t largest) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  REQUIRE(fp8::encode<Format>(std::numeric_limits<float>::quiet_NaN()) == 0x7F);
  REQUIRE(fp8::encode<Format>(-std::numeric_limits<float>::quiet_NaN()) == 0x7F);
  for (const float big : {Format::kMax * 1.5F, std::numeric_limits<float>::max(), kInf}) {
    REQUIRE(fp8::encode<Format>(big) == largest);
    REQUIRE(fp8::encode<Format>(-big) == (largest | 0x80));
  }
  for (const float tiny : {std::numeric_limits<float>::denorm_min(), 1e-30F}) {
    REQUIRE(fp8::encode<Format>(tiny) == 0);
    REQUIRE(fp8::encode<Format>(-tiny) == 0x80);
  }
}

}  // namespace

TEST_CASE("e4m3 encodes and decodes by its definition") {
  check_rounding<E4M3>(finite_values(3, 7, 0x7F));
  check_special<E4M3>(0x7E);
  REQUIRE(std::isnan(fp8::decode<E4M3>(0x7F)));
  REQUIRE(std::isnan(fp8::decode<E4M3>(0xFF)));
}

TEST_CASE("e5m2 encodes and decodes by its definition") {
  check_rounding<E5M2>(finite_values(2, 15, 0x7C));
  check_special<E5M2>(0x7B);
  REQUIRE(std::isinf(fp8::decode<E5M2>(0x7C)));
  REQUIRE(std::isnan(fp8::decode<E5M2>(0x7D)));
}

TEST_CASE("quant_multiplier keeps the numerics contract") {
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  REQUIRE(fp8::quant_multiplier(0.0F, 448.0F, false) == 1.0F);
  REQUIRE(fp8::quant_multiplier(448.0F, 448.0F, false) == 1.0F);
  REQUIRE(fp8::quant_multiplier(1e-40F, 448.0F, false) == kMax);
  REQUIRE(fp8::quant_multiplier(kInf, 448.0F, false) == 0.0F);
  REQUIRE(
      std::isnan(fp8::quant_multiplier(std::numeric_limits<float>::quiet_NaN(), 448.0F, false)));
}

TEST_CASE("quant_multiplier as a power of two is rounded down, and its scale is finite") {
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const float format_max : {E4M3::kMax, E5M2::kMax}) {
    // Amaxes around every point where the quotient is a power of two, down to subnormals and up to
    // the largest.
    for (int exponent = -149; exponent <= 127; ++exponent) {
      const float base = std::ldexp(1.0F, exponent);
      for (const float amax : {base, 1.75F * base, std::nextafter(1.75F * base, kInf),
                               std::nextafter(1.75F * base, 0.0F), std::nextafter(base, kInf)}) {
        if (amax == 0.0F || std::isinf(amax)) continue;
        const float exact = fp8::quant_multiplier(amax, format_max, false);
        const float rounded = fp8::quant_multiplier(amax, format_max, true);
        INFO(amax << " " << exact << " " << rounded);
        int power = 0;
        REQUIRE(std::frexp(rounded, &power) == 0.5F);
        REQUIRE(rounded <= exact);
        REQUIRE(static_cast<double>(rounded) * 2 > exact);
        const float scale = 1.0F / rounded;
        REQUIRE(static_cast<double>(scale) * rounded == 1.0);
        REQUIRE(scale >= std::ldexp(1.0F, -127));
        REQUIRE(scale <= std::ldexp(1.0F, 120));
      }
    }
    REQUIRE(fp8::quant_multiplier(0.0F, format_max, true) == 1.0F);
    REQUIRE(fp8::quant_multiplier(kInf, format_max, true) == 0.0F);
    REQUIRE(std::isnan(fp8::quant_multiplier(std::nanf(""), format_max, true)));
    REQUIRE(fp8::quant_multiplier(1e-45F, format_max, true) == std::ldexp(1.0F, 127));
    REQUIRE(fp8::quant_multiplier(kMax, format_max, true) ==
            std::ldexp(1.0F, format_max == E4M3::kMax ? -120 : -113));
  }
}

TEST_CASE("magnitude_bits orders like the values, NaN above all") {
  const float values[] = {0.0F,
                          1e-45F,
                          1e-38F,
                          1.0F,
                          3e38F,
                          std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()};
  for (size_t i = 0; i + 1 < std::size(values); ++i) {
    REQUIRE(fp8::magnitude_bits(values[i]) < fp8::magnitude_bits(values[i + 1]));
    REQUIRE(fp8::magnitude_bits(-values[i]) == fp8::magnitude_bits(values[i]));
  }
}
