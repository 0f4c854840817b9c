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
  bool whole;   // rows lie on 16 bytes and have whole eights
  int ahead;    // rows on their way beside the one at hand
  float* amax;  // [blocks], or nullptr
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

// max |y| of a thread's elements, for a quantization that would read y for it: nothing of it where
// nobody asks.
template <typename T, bool kLeaves>
struct OutputAmax {
  __device__ __forceinline__ void update(const Vec8<T>& /*y*/, int /*valid*/) {}
  __device__ __forceinline__ void leave(float* /*parts*/) const {}
};

template <typename T>
struct OutputAmax<T, true> {
  static_assert(sizeof(T) == 2);
  uint32_t pair = 0;  // bits of two magnitudes, which order like the values, NaN above all

  __device__ __forceinline__ void update(Vec8<T> y, int valid) {
    if (valid < 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y.words[i] &= valid >= 2 * i + 2 ? ~0U : valid == 2 * i + 1 ? 0xFFFFU : 0U;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) pair = __vmaxu2(pair, y.words[i] & 0x7FFF7FFFU);
  }
  // The block's, at its place. All threads.
  __device__ __forceinline__ void leave(float* parts) const {
    __shared__ uint32_t of_warps[kMaxRowThreads / 32];
    const float own = Vec8<T>::bits_to_float(max(pair >> 16, pair & 0xFFFFU));
    uint32_t bits = warp_max(__float_as_uint(own));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = bits;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    bits = warp_max(threadIdx.x < blockDim.x / 32 ? of_warps[threadIdx.x] : 0);
    if (threadIdx.x == 0) parts[blockIdx.x] = __uint_as_float(bits);
  }
};

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
// turn: 0 or 1, another than for the row before. amax: an OutputAmax of what is written.
template <ForwardKind kKind, typename T, typename W, typename ForEights, typename Scale,
          typename BeforeOutput, typename Amax>
__device__ __forceinline__ void norm_row(const ForwardParams<T, W>& p, int64_t row, bool exists,
                                         const RowThreads& at, const RowSums<1>& sums, int turn,
                                         const ForEights& for_eights, const Scale& scale,
                                         const BeforeOutput& before_output, Amax& amax) {
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
    const Vec8<T> written = rounded8<T>(out);
    amax.update(written, valid);
    store_first(y + col, written, valid, p.y.vectorized);
  });
}

}  // namespace fp8::core
