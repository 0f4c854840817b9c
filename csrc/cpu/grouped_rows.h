// What the grouped passes on the CPU share: rows of any high-precision dtype as floats, and groups.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cpu/loops.h"
#include "host/formats.h"
#include "host/launch.h"

namespace fp8::cpu {

using core::Dtype;

// Rows that a thread should take at least.
inline int64_t grain(int64_t row_elements) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_elements));
}

// Elements of a tensor of any high-precision dtype as floats.
inline void read(const void* x, Dtype dtype, int64_t offset, int64_t count, float* out) {
  widen(static_cast<const char*>(x) + offset * dtype_bytes(dtype), dtype, count, out);
}

inline void write(void* x, Dtype dtype, int64_t offset, int64_t count, const float* values) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == Dtype::kFloat32) {
      static_cast<float*>(x)[offset + i] = values[i];
    } else if (dtype == Dtype::kBFloat16) {
      static_cast<c10::BFloat16*>(x)[offset + i] = c10::BFloat16(values[i]);
    } else {
      static_cast<c10::Half*>(x)[offset + i] = c10::Half(values[i]);
    }
  }
}

inline float rounded(float value, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return static_cast<float>(c10::BFloat16(value));
  if (dtype == Dtype::kFloat16) return static_cast<float>(c10::Half(value));
  return value;
}

// How a pass makes codes.
struct CodeFormat {
  Dtype dtype;
  bool power_of_two;
  float multiplier(float amax) const {
    return quant_multiplier(amax, fp8_max(dtype), power_of_two);
  }
};

// Codes of a row, and its scale.
inline float quantize_row(const float* row, int64_t cols, void* data, int64_t offset,
                          const CodeFormat& format) {
  const float multiplier = format.multiplier(std::bit_cast<float>(amax_bits(row, cols)));
  encode(row, multiplier, format.dtype, cols, static_cast<uint8_t*>(data) + offset);
  return 1.0F / multiplier;
}

// Elements of a row of `cols` that share a scale.
inline int64_t scaled_together(core::Granularity granularity, int64_t cols) {
  return granularity == core::Granularity::kBlock1x128 ? core::kScaleBlock : cols;
}

// Codes of a row, and a scale for each `block` elements of it, `step` floats apart.
inline void quantize_blocks(const float* row, int64_t cols, int64_t block, uint8_t* codes,
                            float* scales, int64_t step, const CodeFormat& format) {
  for (int64_t begin = 0; begin < cols; begin += block) {
    const int64_t count = std::min(block, cols - begin);
    *scales = quantize_row(row + begin, count, codes, begin, format);
    scales += step;
  }
}

// Rows that belong to a group, and the group of one of them.
inline int64_t grouped_rows(const int32_t* offsets, int64_t groups, int64_t rows) {
  if (offsets == nullptr) return rows;
  return groups == 0 ? 0 : std::min<int64_t>(offsets[groups - 1], rows);
}

inline int64_t group_of(const int32_t* offsets, int64_t groups, int64_t row) {
  return std::upper_bound(offsets, offsets + groups - 1, row) - offsets;
}

}  // namespace fp8::cpu
