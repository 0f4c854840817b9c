// A matrix in several tensors as a source of the quantize kernels (source.cuh): weights one below
// the other, or gradients side by side, whose rows lie on 16 bytes. Which tensor an element is in
// is a few comparisons of a row, or of a column that a thread keeps for all of its rows.
#pragma once

#include <cstdint>
#include <limits>

#include "core/device/dispatch.cuh"
#include "core/quantize/source.cuh"
#include "fp8/core_joined.h"

namespace fp8::core {

// Where a part would begin if it were the whole matrix, so that its elements have the matrix's rows
// and columns for addresses.
template <typename T>
struct JoinedPlace {
  const T* x;
  int32_t ld;
};

template <typename T>
struct JoinedTensors {
  JoinedPlace<T> places[kMaxJoinedParts];
  int32_t begin[kMaxJoinedParts];  // first row or column; past the matrix where there is no part

  // Of the row, or column, `at`. Constant indices: nothing goes through local memory.
  __device__ __forceinline__ JoinedPlace<T> of(int64_t at) const {
    JoinedPlace<T> place = places[0];
#pragma unroll
    for (int i = 1; i < kMaxJoinedParts; ++i) {
      if (static_cast<int32_t>(at) >= begin[i]) place = places[i];
    }
    return place;
  }
};

// One below the other, as weights: e4m3, and squares of 128 x 128.
template <typename T>
struct StackedSource {
  using Element = T;
  using TensorFormat = E4M3;            // with one scale
  static constexpr int kMinBlocks = 3;  // four would spill where rows and columns have scales
  static constexpr Granularity kBlocks = Granularity::kBlock128x128;
  JoinedTensors<T> tensors;
  int64_t rows;
  int64_t cols;

  __device__ __forceinline__ int64_t cols_of(int64_t index) const {
    return index < rows ? cols : 0;
  }
  __device__ __forceinline__ const T* row(int64_t index) const {
    const JoinedPlace<T> place = tensors.of(index);
    return place.x + index * place.ld;
  }
  __device__ __forceinline__ Vec8<T> load(const T* row, int64_t col, int valid) const {
    return load8(row + col, valid, true);
  }
};

// Side by side, as gradients: no eight of columns lies in two of them.
template <typename T>
struct SideBySideSource {
  using Element = T;
  using TensorFormat = E5M2;
  static constexpr int kMinBlocks = 4;
  static constexpr int kBlockwiseMinBlocks = 3;
  static constexpr Granularity kBlocks = Granularity::kBlock1x128;
  JoinedTensors<T> tensors;
  int64_t rows;
  int64_t cols;

  __device__ __forceinline__ int64_t cols_of(int64_t index) const {
    return index < rows ? cols : 0;
  }
  __device__ __forceinline__ int64_t row(int64_t index) const { return index; }
  __device__ __forceinline__ Vec8<T> load(int64_t row, int64_t col, int valid) const {
    const JoinedPlace<T> place = tensors.of(col);
    return load8(place.x + row * place.ld + col, valid, true);
  }
};

template <template <typename> class Source, typename T>
Source<T> joined_source(const JoinedArgs& args) {
  Source<T> source{};
  int64_t begin = 0;
  for (int i = 0; i < kMaxJoinedParts; ++i) {
    if (i >= args.count) {
      source.tensors.begin[i] = std::numeric_limits<int32_t>::max();
      continue;
    }
    const JoinedPart& part = args.parts[i];
    // As an integer: it may lie outside of what was allocated.
    const auto shift =
        static_cast<uintptr_t>(begin * (args.side_by_side ? 1 : part.ld)) * sizeof(T);
    const uintptr_t place = reinterpret_cast<uintptr_t>(part.x) - shift;
    source.tensors.places[i] = {reinterpret_cast<const T*>(place), static_cast<int32_t>(part.ld)};
    source.tensors.begin[i] = static_cast<int32_t>(begin);
    begin += part.extent;
  }
  source.rows = args.quantize.rows;
  source.cols = args.quantize.cols;
  return source;
}

// f(source) with the parts of these arguments, of 16-bit elements.
template <typename F>
void with_joined_source(const JoinedArgs& args, const F& f) {
  const auto go = [&](auto type) {
    using T = typename decltype(type)::type;
    if (args.side_by_side) {
      f(joined_source<SideBySideSource, T>(args));
    } else {
      f(joined_source<StackedSource, T>(args));
    }
  };
  if (args.quantize.x_dtype == Dtype::kBFloat16) {
    go(Type<__nv_bfloat16>{});
  } else {
    go(Type<__half>{});
  }
}

}  // namespace fp8::core
