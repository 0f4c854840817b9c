// What the kernels of this folder share: groups and their rows on the device.
#pragma once

#include "core/device/dispatch.cuh"
#include "core/device/reduce.cuh"
#include "fp8/core_grouped.h"
#include "host/launch.h"

namespace fp8::core {

// Rows that belong to a group; what lies behind them is nobody's. Without offsets all rows count.
__device__ __forceinline__ int64_t grouped_rows(const int32_t* offsets, int64_t groups,
                                                int64_t rows) {
  if (offsets == nullptr) return rows;
  return groups == 0 ? 0 : min(static_cast<int64_t>(__ldg(offsets + groups - 1)), rows);
}

// The group of a row below the last offset: the first whose end lies behind it.
__device__ __forceinline__ int group_of(const int32_t* offsets, int64_t groups, int64_t row) {
  int low = 0;
  int high = static_cast<int>(groups) - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(offsets + middle) > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Sum of the values of the threads before this one; *total is that of all. kThreadCount threads
// take part; scratch: one word a warp, reused after the next barrier.
template <int kThreadCount>
__device__ __forceinline__ int exclusive_scan(int value, int* total, int* scratch) {
  constexpr int kWarpCount = kThreadCount / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFU, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int before = 0;
  int all = 0;
#pragma unroll
  for (int w = 0; w < kWarpCount; ++w) {
    if (w < warp) before += scratch[w];
    all += scratch[w];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

inline void check_gate(const GateArgs& a) {
  require(a.rows > 0 && a.features > 0 && a.features % 16 == 0,
          "gated activations take rows, and features in sixteens");
  require(on_16_bytes(a.gate_up) && on_16_bytes(a.bias),
          "gated activations expect 16-byte aligned rows");
}

}  // namespace fp8::core
