// Where rows of codes go that follow each other: a sink of row.cuh and computed_row.cuh.
#pragma once

#include <cstdint>

#include "fp8/core.h"

namespace fp8::core {

// Rows and columns of padding are zeros, with a scale of 1.
struct PaddedRows {
  static constexpr bool kPadded = true;  // see computed_row.cuh
  Destination data;
  float* scale;  // [data.rows]

  __device__ __forceinline__ bool has(int64_t row, bool /*exists*/) const {
    return row < data.rows;
  }
  __host__ __device__ __forceinline__ int64_t cols() const { return data.ld; }
  __device__ __forceinline__ void put_scale(int64_t row, float value) const { scale[row] = value; }
  __device__ __forceinline__ int early(int64_t /*row*/) const { return 0; }
  __device__ __forceinline__ uint8_t* row(int64_t index, int /*early*/) const {
    return static_cast<uint8_t*>(data.data) + index * data.ld;
  }
  __device__ __forceinline__ void put(uint8_t* row, int64_t col, uint2 codes) const {
    *reinterpret_cast<uint2*>(row + col) = codes;
  }
};

}  // namespace fp8::core
