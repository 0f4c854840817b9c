// Gradients of a norm of rows that fit into a block. Blocks stay; each of their slots (the threads
// of a row) takes every so-manyth row. The next rows of x, dy and what is added to dx are on their
// way through shared memory meanwhile (next_rows.cuh). Weight and the sums for weight and bias of a
// thread's columns stay in registers over all its rows, and g between the sum over a row and dx; x
// does not: it is read from shared memory again, but for LayerNorm of 16 bits, whose two vectors
// there is room for. Of four (kTwice), for twice as long rows, the weight and the sums stay and
// nothing else does.
#pragma once

#include "core/norm/backward.cuh"

namespace fp8::core {

// A thread's sums of its eights [kVectors], in the order of NormPlan.
template <int kVectors>
__device__ __forceinline__ float joined_eights(const float (&sums)[kVectors], bool pairs) {
  if constexpr (kVectors == 4) {
    if (pairs) return add(add(sums[0], sums[2]), add(sums[1], sums[3]));
  }
  float total = sums[0];
#pragma unroll
  for (int i = 1; i < kVectors; ++i) total = add(total, sums[i]);
  return total;
}

// Adds the slots' sums [kVectors][8] of a block up and writes them: parts [cols] of this block.
// shared: a float for each of the threads' sums, on 16 bytes; no copy is on its way to it.
template <int kVectors>
__device__ __forceinline__ void leave_part(float (&sums)[kVectors][8], int threads_per_row,
                                           int cols, float* shared, float* parts) {
  for (int offset = threads_per_row; offset < 32; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[i][j] = add(sums[i][j], __shfl_xor_sync(0xFFFFFFFFU, sums[i][j], offset));
      }
    }
  }
  const int group_threads = max(threads_per_row, 32);
  const int groups = kNormBackwardThreads / group_threads;
  const int group = static_cast<int>(threadIdx.x) / group_threads;
  const int thread = static_cast<int>(threadIdx.x) % group_threads;
  const int width = kVectors * 8 * threads_per_row;
  __syncthreads();  // other threads' rows, or the sums before, lay there
  if (thread < threads_per_row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      auto* to =
          reinterpret_cast<float4*>(shared + group * width + (i * threads_per_row + thread) * 8);
      to[0] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
      to[1] = make_float4(sums[i][4], sums[i][5], sums[i][6], sums[i][7]);
    }
  }
  __syncthreads();
  for (int col = static_cast<int>(threadIdx.x); col < cols; col += kNormBackwardThreads) {
    float sum = shared[col];
    for (int g = 1; g < groups; ++g) sum = add(sum, shared[g * width + col]);
    parts[col] = sum;
  }
}

// kTwice: a thread has twice the vectors of the plan, whose rows take two iterations.
template <typename T, typename W, BackwardKind kKind, bool kTwice>
__global__ void __launch_bounds__(kNormBackwardThreads, 1)
    norm_backward_kernel(const BackwardParams<T, W> p) {
  constexpr bool kLayer = kKind == BackwardKind::kLayer;
  constexpr bool kRounds = kKind == BackwardKind::kRoundedRms;
  constexpr bool kKeepsG = !kRounds && !kTwice;
  constexpr bool kKeepsHat = kLayer && sizeof(T) == 2 && !kTwice;
  constexpr int kVectors = (kTwice ? 2 : 1) * norm_backward_vectors(kLayer, kDtypeOf<T>);
  constexpr int kSums = kLayer ? 2 : 1;
  using Next = NextRows<T, kVectors, kNormBackwardThreads>;
  extern __shared__ uint4 shared[];
  __shared__ __align__(16) float scratch[2 * kSumScratch<kSums>];
  const int slots = kNormBackwardThreads / p.threads_per_row;
  const int slot = static_cast<int>(threadIdx.x) / p.threads_per_row;
  const int first_col = static_cast<int>(threadIdx.x) % p.threads_per_row * 8;
  const int stride = p.threads_per_row * 8;
  const int step = static_cast<int>(gridDim.x) * slots;
  const int rows = static_cast<int>(p.rows);
  const auto cols = static_cast<float>(p.cols);
  const bool joins = p.addend.data != nullptr;

  const RowSums<kSums> row_sums(slot, p.threads_per_row, scratch);
  // A place for x, dy and, where it is, what is added to dx, side by side, for each row.
  const Next next{first_col, stride, p.cols};
  constexpr uint32_t kBytes = Next::bytes(kNormBackwardThreads);
  const uint32_t place_bytes = (joins ? 3 : 2) * kBytes;
  const uint32_t first_place = first_slot(shared);
  HeldParameter<W, kVectors> weight(p.of.weight, p.of.vectorized, 1.0F, first_col, stride, p.cols);
  const auto copy = [&](uint32_t place, int row) {
    if (row < rows && p.whole) {
      next.copy_async(place, p.x.row(row));
      next.copy_async(place + kBytes, p.dy.row(row));
      if (joins) next.copy_async(place + 2 * kBytes, p.addend.row(row));
    } else if (row < rows) {
      next.copy_now(place, p.x.row(row), p.x.vectorized);
      next.copy_now(place + kBytes, p.dy.row(row), p.dy.vectorized);
      if (joins) next.copy_now(place + 2 * kBytes, p.addend.row(row), p.addend.vectorized);
    }
    __pipeline_commit();
  };

  float dweight[kVectors][8];
  float dbias[kLayer ? kVectors : 1][8];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      dweight[i][j] = 0.0F;
      if constexpr (kLayer) dbias[i][j] = 0.0F;
    }
  }
  // Slots of a block take as many turns: those of a warp meet in its shuffles, and racecheck takes
  // warps for one behind the other that went through more barriers, whichever these are.
  const int first = static_cast<int>(blockIdx.x) * slots + slot;
  const int end = rows + slot;
  for (int i = 0; i < p.ahead; ++i) copy(first_place + i * place_bytes, first + i * step);
  RowStatistics statistics = statistics_of<kKind>(p, min(first, rows - 1));
  const uint32_t last_place = first_place + p.ahead * place_bytes;
  uint32_t place = first_place;  // of the row at hand
  int turn = 0;
#pragma unroll 1
  for (int row = first; row < end; row += step) {
    // Where the row before lay, or this one, if there is but one place.
    copy(place == first_place ? last_place : place - place_bytes, row + p.ahead * step);
    const RowStatistics next_statistics = statistics_of<kKind>(p, min(row + step, rows - 1));
    wait_for_copies(p.ahead);
    const bool exists = row < rows;
    if constexpr (sizeof(W) == 2) weight.forget();

    float hat[kKeepsHat ? kVectors : 1][8];
    float g[kKeepsG ? kVectors : 1][8];
    Vec8<T> rounded_g[kRounds ? kVectors : 1];
    float sums[kSums][kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int col = first_col + i * stride;
      const int valid = of_eight(p.cols - col);
      float row_terms[kSums] = {};
      if (exists && valid > 0) {
        const Eight<T, kKind> eight(next.read(place + kBytes, i), next.read(place, i),
                                    weight.get(i, col, valid), p.of.offset, statistics);
        float terms[8];
        eight.weight_terms(terms);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          dweight[i][j] = add(dweight[i][j], terms[j]);
          if constexpr (kLayer) dbias[i][j] = add(dbias[i][j], eight.dy[j]);
          if constexpr (kKeepsHat) hat[i][j] = eight.hat[j];
          if constexpr (kKeepsG) g[i][j] = eight.g[j];
        }
        eight.row_terms(valid, row_terms);
        if constexpr (kRounds) rounded_g[i] = eight.rounded_g;
      }
#pragma unroll
      for (int k = 0; k < kSums; ++k) sums[k][i] = row_terms[k];
      if (kKeepsHat || kTwice) asm volatile("" ::: "memory");
    }
    if (p.dx.data != nullptr) {
      float totals[kSums];
#pragma unroll
      for (int k = 0; k < kSums; ++k) totals[k] = joined_eights(sums[k], p.pairs);
      row_sums.join(totals, turn);
      const NormGradient of_row = norm_gradient<kLayer>(kLayer ? totals[kSums - 1] : 0.0F,
                                                        totals[0], statistics.rstd, cols);
      T* dx_row = p.dx.row(row);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int col = first_col + i * stride;
        const int valid = of_eight(p.cols - col);
        if (!exists || valid <= 0) continue;
        float dx[8];
        const Vec8<T> x = kKeepsHat ? zero8<T>() : next.read(place, i);
        const Vec8<T> dy = kTwice ? next.read(place + kBytes, i) : zero8<T>();
        const Vec8<W> w = kTwice ? weight.get(i, col, valid) : zero8<W>();
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float x_hat = kKeepsHat
                                  ? hat[kKeepsHat ? i : 0][j]
                                  : norm_hat<kLayer>(x.get(j), statistics.mean, statistics.rstd);
          const float of_dy = kRounds   ? rounded_g[kRounds ? i : 0].get(j)
                              : kKeepsG ? g[kKeepsG ? i : 0][j]
                                        : mul(dy.get(j), w.get(j));
          dx[j] = norm_dx<kLayer>(of_dy, x.get(j), x_hat, cols, of_row);
        }
        Vec8<T> out = rounded8<T>(dx);
        if (joins) out = joined_dx(next.read(place + 2 * kBytes, i), out);
        if (p.whole) {
          store8(dx_row + col, out);
        } else {
          store_first(dx_row + col, out, valid, p.dx.vectorized);
        }
      }
    }
    statistics = next_statistics;
    place = place == last_place ? first_place : place + place_bytes;
    turn ^= 1;
  }
  let_next_start();
  __pipeline_wait_prior(0);
  auto* of_slots = reinterpret_cast<float*>(shared);
  const int64_t part = static_cast<int64_t>(blockIdx.x) * p.cols;
  if (p.weight_parts != nullptr) {
    leave_part(dweight, p.threads_per_row, p.cols, of_slots, p.weight_parts + part);
  }
  if constexpr (kLayer) {
    if (p.bias_parts != nullptr) {
      leave_part(dbias, p.threads_per_row, p.cols, of_slots, p.bias_parts + part);
    }
  }
}

}  // namespace fp8::core
