// What the kernels of a norm's forward share: their arguments, and what is computed of a row.
#pragma once

#include "core/norm/norm.cuh"

namespace fp8::core {

enum class ForwardKind : uint8_t { kRms, kAddRms, kLayer };

template <typename T, typename W>
struct ForwardParams {
  RowsOf<const T> x;
  RowsOf<const T> residual;
  RowsOf<T> y;
  RowsOf<T> sum;
  NormParameters<W> of;
  float* mean;
  float* rstd;
  int64_t rows;
  int cols;
  float eps;
  int threads_per_row;
  int iterations;
  bool whole;  // rows lie on 16 bytes and have whole eights
  int ahead;   // rows on their way beside the one at hand
};

// v becomes T(v + other).
template <typename T, int kCount>
__device__ __forceinline__ void add_to(Vec8<T> (&v)[kCount], const Vec8<T> (&other)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float both[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) both[j] = add(v[i].get(j), other[i].get(j));
    v[i] = rounded8<T>(both);
  }
}

// A row's place among the threads of a block.
struct RowThreads {
  int slot;
  int thread;  // of the row's

  __device__ __forceinline__ explicit RowThreads(int threads_per_row)
      : slot(static_cast<int>(threadIdx.x) / threads_per_row),
        thread(static_cast<int>(threadIdx.x) % threads_per_row) {}
};

// for_eights(f) calls f(v, i, col, valid) of each of the thread's eights, in each of two passes, of
// LayerNorm three; those past the row hold zeros and have none valid. scale(out, i, col, valid)
// multiplies xhat by the weight and adds the bias; before the last pass comes before_output().
// turn: 0 or 1, another than for the row before.
template <ForwardKind kKind, typename T, typename W, typename ForEights, typename Scale,
          typename BeforeOutput>
__device__ __forceinline__ void norm_row(const ForwardParams<T, W>& p, int64_t row, bool exists,
                                         const RowThreads& at, const RowSums<1>& sums, int turn,
                                         const ForEights& for_eights, const Scale& scale,
                                         const BeforeOutput& before_output) {
  constexpr bool kLayer = kKind == ForwardKind::kLayer;
  const auto cols = static_cast<float>(p.cols);
  float total[1] = {0.0F};
  float mean = 0.0F;
  if constexpr (kLayer) {
    for_eights([&](const Vec8<T>& v, int /*i*/, int /*col*/, int /*valid*/) {
      float terms[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) terms[j] = v.get(j);
      total[0] = add(total[0], joined8(terms));
    });
    sums.join(total, 0);
    mean = divide(total[0], cols);
    total[0] = 0.0F;
  }
  for_eights([&](const Vec8<T>& v, int /*i*/, int /*col*/, int valid) {
    float terms[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float d = kLayer ? sub(v.get(j), mean) : v.get(j);
      terms[j] = mul(d, d);
    }
    if (kLayer && valid < 8) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j >= valid) terms[j] = 0.0F;
      }
    }
    total[0] = add(total[0], joined8(terms));
  });
  sums.join(total, kLayer ? 1 : turn);
  const float rstd = rstd_of(total[0], cols, p.eps);

  if (!exists) return;
  if (at.thread == 0) {
    p.rstd[row] = rstd;
    if constexpr (kLayer) p.mean[row] = mean;
  }
  T* y = p.y.row(row);
  before_output();
  for_eights([&](const Vec8<T>& v, int i, int col, int valid) {
    if (valid <= 0) return;
    float out[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = norm_hat<kLayer>(v.get(j), mean, rstd);
    if (!kLayer && p.of.round_first) round8<T>(out);
    scale(out, i, col, valid);
    if constexpr (kKind == ForwardKind::kAddRms) {
      store_first(p.sum.row(row) + col, v, valid, p.sum.vectorized);
    }
    store_first(y + col, rounded8<T>(out), valid, p.y.vectorized);
  });
}

}  // namespace fp8::core
