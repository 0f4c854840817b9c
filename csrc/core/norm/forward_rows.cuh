// A norm's forward for many rows of 16 bits that fit into registers: blocks stay, and each of their
// slots (the threads of a row) takes every so-manyth row, while the next ones are on their way
// through shared memory (next_rows.cuh). Weight and bias stay in registers.
#pragma once

#include "core/norm/forward.cuh"

namespace fp8::core {

// Blocks to a multiprocessor: a thread has 64 registers where there are two.
template <ForwardKind kKind>
constexpr int kStayingBlocks = kKind == ForwardKind::kRms ? 2 : 1;

template <typename T, typename W, ForwardKind kKind, bool kAmax>
__global__ void __launch_bounds__(kMaxRowThreads, kStayingBlocks<kKind>)
    norm_forward_rows_kernel(const ForwardParams<T, W> p) {
  constexpr bool kLayer = kKind == ForwardKind::kLayer;
  constexpr bool kAdds = kKind == ForwardKind::kAddRms;
  constexpr int kVectors = kNormVectors;
  using Next = NextRows<T, kVectors, kMaxRowThreads>;
  extern __shared__ uint4 shared[];
  __shared__ __align__(16) float scratch[2 * kSumScratch<1>];
  const RowThreads at(p.threads_per_row);
  const int slots = kMaxRowThreads / p.threads_per_row;
  const int step = static_cast<int>(gridDim.x) * slots;
  const int stride = p.threads_per_row * 8;
  const int first_col = at.thread * 8;
  const int rows = static_cast<int>(p.rows);

  const RowSums<1> sums(at.slot, p.threads_per_row, scratch);
  // A place for x and the residual, side by side, for each row.
  const Next next{first_col, stride, p.cols};
  constexpr uint32_t kBytes = Next::bytes(kMaxRowThreads);
  constexpr uint32_t kPlaceBytes = (kAdds ? 2 : 1) * kBytes;
  const uint32_t first_place = first_slot(shared);
  const uint32_t last_place = first_place + p.ahead * kPlaceBytes;
  HeldParameter<W, kVectors> weight(p.of.weight, p.of.vectorized, 1.0F, first_col, stride, p.cols);
  // A bias of -0 changes nothing.
  HeldParameter<W, kVectors> bias(p.of.bias, p.of.vectorized, -0.0F, first_col, stride,
                                  kLayer ? p.cols : 0);
  const auto scale = [&](float(&out)[8], int i, int col, int valid) {
    const Vec8<W> w = weight.get(i, col, valid);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      out[j] = mul(out[j], kLayer ? w.get(j) : norm_factor(w.get(j), p.of.offset));
    }
    if constexpr (kLayer) {
      const Vec8<W> b = bias.get(i, col, valid);
#pragma unroll
      for (int j = 0; j < 8; ++j) out[j] = add(out[j], b.get(j));
    }
  };
  const auto copy = [&](uint32_t place, int row) {
    if (row < rows && p.whole) {
      next.copy_async(place, p.x.row(row));
      if (kAdds) next.copy_async(place + kBytes, p.residual.row(row));
    } else if (row < rows) {
      next.copy_now(place, p.x.row(row), p.x.vectorized);
      if (kAdds) next.copy_now(place + kBytes, p.residual.row(row), p.residual.vectorized);
    }
    __pipeline_commit();
  };

  // Slots of one warp take as many turns, so that they meet in its shuffles.
  const int first = static_cast<int>(blockIdx.x) * slots + at.slot;
  const int end = rows + (p.threads_per_row < 32 ? at.slot % (32 / p.threads_per_row) : 0);
  for (int i = 0; i < p.ahead; ++i) copy(first_place + i * kPlaceBytes, first + i * step);
  uint32_t place = first_place;  // of the row at hand
  OutputAmax<T, kAmax> amax;
  int turn = 0;
#pragma unroll 1
  for (int row = first; row < end; row += step) {
    // Where the row before lay, or this one, if there is but one place.
    copy(place == first_place ? last_place : place - kPlaceBytes, row + p.ahead * step);
    wait_for_copies(p.ahead);
    if constexpr (sizeof(W) == 2) {
      weight.forget();
      bias.forget();
    }
    Vec8<T> v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) v[i] = next.take(place, i);
    if constexpr (kAdds) {
      Vec8<T> residual[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) residual[i] = next.take(place + kBytes, i);
      add_to(v, residual);
    }
    const auto for_eights = [&](const auto& f) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int col = first_col + i * stride;
        f(v[i], i, col, of_eight(p.cols - col));
      }
    };
    norm_row<kKind>(p, row, row < rows, at, sums, turn, for_eights, scale, [] {}, amax);
    place = place == last_place ? first_place : place + kPlaceBytes;
    turn ^= 1;
  }
  amax.leave(p.amax);
}

}  // namespace fp8::core
