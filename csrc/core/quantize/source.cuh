// Where eight elements come from, for kernels that quantize them: a matrix in memory, rows gathered
// from one, or (core/grouped/gated.cuh) what a kernel computes from other tensors as it reads them.
//
// A source has
//
//   Element: what its eight elements are rounded to, float, __nv_bfloat16 or __half.
//
//   cols_of(index): columns of a row, 0 where there is no such row.
//
//   row(index): where the elements of a row lie.
//
//   load(row, col, valid): a Vec8<Element> from `col`, a multiple of 8. `valid` of the eight are
//   there (of_eight); the others are zeros.
//
// One that computes may split load, so that several eights are on their way before the first is
// computed, and say how many blocks of 256 threads its registers leave a multiprocessor:
//
//   Raw, fetch(row, col): what an eight is made of; in bounds whatever the column.
//
//   finish(raw, valid): the eight itself.
//
//   kMinBlocks
//
// It is copied into the kernel with its other parameters. It may read only what was complete
// before the launch that the kernel overlaps (dispatch.cuh).
#pragma once

#include "core/device/vectors.cuh"

namespace fp8::core {

// [rows, cols], `ld` elements from row to row.
template <typename T>
struct MatrixSource {
  using Element = T;
  const T* x;
  int64_t rows;
  int64_t cols;
  int64_t ld;
  bool vectorized;  // rows start on 16-byte boundaries

  __device__ __forceinline__ int64_t cols_of(int64_t index) const {
    return index < rows ? cols : 0;
  }
  __device__ __forceinline__ const T* row(int64_t index) const { return x + index * ld; }
  __device__ __forceinline__ Vec8<T> load(const T* row, int64_t col, int valid) const {
    return load8(row + col, valid, vectorized);
  }
};

template <typename Source>
concept Fetches = requires { typename Source::Raw; };

// Eights of one row, `step` columns from one to the next; zeros from column `cols` on.
template <typename Source, typename Row, int kCount>
__device__ __forceinline__ void load_vectors(const Source& source, const Row& row, int64_t col,
                                             int64_t step, int64_t cols,
                                             Vec8<typename Source::Element> (&v)[kCount]) {
  if constexpr (Fetches<Source>) {
    typename Source::Raw raw[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw[i] = source.fetch(row, col + i * step);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = source.finish(raw[i], of_eight(cols - col - i * step));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t at = col + i * step;
      v[i] = source.load(row, at, of_eight(cols - at));
    }
  }
}

// A kernel's parameters: where elements come from, and what is made of them.
template <typename Source, typename Params>
struct From {
  Source source;
  Params to;
};

// What kernels.h's parameters say of x.
template <typename T, typename Params>
__host__ __device__ __forceinline__ MatrixSource<T> matrix_source(const Params& p) {
  return {static_cast<const T*>(p.x), p.rows, p.cols, p.ld, p.vectorized};
}

// A matrix whose last row is shorter: one long row, folded.
template <typename T>
struct FoldedSource : MatrixSource<T> {
  int64_t last_row_cols;

  __device__ __forceinline__ int64_t cols_of(int64_t index) const {
    return index == this->rows - 1 ? last_row_cols : MatrixSource<T>::cols_of(index);
  }
};

// Row r is row source[r] / copies of a matrix; r itself where there is no `source`.
template <typename T>
struct GatheredSource : MatrixSource<T> {
  const int32_t* source;
  int64_t copies;

  __device__ __forceinline__ const T* row(int64_t index) const {
    return MatrixSource<T>::row(source == nullptr ? index : __ldg(source + index) / copies);
  }
};

}  // namespace fp8::core
