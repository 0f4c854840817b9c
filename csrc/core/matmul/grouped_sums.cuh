// The sums of a grouped product's tile, by one warpgroup: wgmma from the stages that are full,
// which it then gives back.
//
// Fast: one chain of products over the whole contraction, the next stage's issued while the last
// one's run. Split: a chain for each 128 elements, which is then added to registers in fp32 (times
// scales, in blocks) while the other warpgroup's products run; this needs 192 registers a thread.
#pragma once

#include "core/device/hopper.cuh"
#include "core/matmul/grouped_config.cuh"
#include "core/matmul/grouped_tiles.cuh"

namespace fp8::core::grouped {

// A warpgroup's part of a tile: sums over the contraction, and its results.
template <typename C>
struct Multiplier {
  static constexpr int kSums = C::kN / 2;  // of a thread, for each block of 64 rows
  const Params& p;
  const Shared<C>& shared;
  Ring<C::kStages>& ring;
  int warpgroup;

  __device__ __forceinline__ int block_of(int own) const {
    return C::kPingPong ? own : warpgroup + 2 * own;
  }
  __device__ __forceinline__ void wait_full() const {
    hopper::wait(shared.full(ring.stage), ring.parity);
  }
  // Where each warpgroup has tiles of its own, one begins when the other has seen all stages of its
  // tile: a barrier's parity cannot tell a phase from the one after the next.
  __device__ __forceinline__ void wait_for_turn() const {
    if constexpr (C::kPingPong) hopper::sync_threads<256>(3 + warpgroup);
  }
  __device__ __forceinline__ void end_turn() const {
    if constexpr (C::kPingPong) hopper::arrive_at<256>(3 + (warpgroup ^ 1));
  }
  // Each warp for itself: it knows of its own quarter of the products only.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 == 0) hopper::arrive(shared.empty(stage));
  }

  // left: of the group's contraction, from this stage on. What the stage has beyond belongs to
  // another group: zeros stand in for it.
  __device__ __forceinline__ void issue(float (&sums)[kSums], int own, int left, int add) const {
    const uint64_t a = hopper::wgmma_operand(shared.a(ring.stage, block_of(own)));
    const uint64_t b = hopper::wgmma_operand(shared.b(ring.stage));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool beyond = C::kColumns && i * 32 >= left;
      hopper::wgmma<C::kN>(sums, beyond ? shared.zeros() : a + i * hopper::kNextK,
                           beyond ? shared.zeros() : b + i * hopper::kNextK, i > 0 ? 1 : add);
    }
  }

  // kOwn: how many of the warpgroup's blocks have rows.
  template <int kOwn>
  __device__ __forceinline__ void fast(float (&sums)[C::kOwnBlocks][kSums], int k) const {
    int last = -1;
    for (int left = k; left > 0; left -= 128) {
      wait_full();
      if (left <= 128) end_turn();
      hopper::wgmma_fence();
#pragma unroll
      for (int own = 0; own < kOwn; ++own) issue(sums[own], own, left, last >= 0);
      hopper::wgmma_commit();
      hopper::wgmma_wait<1>();
      if (last >= 0) release(last);
      last = ring.stage;
      ring.next();
    }
    hopper::wgmma_wait<0>();
#pragma unroll
    for (int own = 0; own < kOwn; ++own) hopper::settle(sums[own]);
    release(last);
  }

  template <int kOwn>
  __device__ __forceinline__ void split(float (&sums)[C::kOwnBlocks][kSums],
                                        const Tile& tile) const {
    float part[kSums];
    BlockScales scales(*this, tile);
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[own][i] = 0.0F;
    }
    for (int left = tile.k; left > 0; left -= 128) {
      wait_full();
      if (left <= 128) end_turn();
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        hopper::wgmma_fence();
        issue(part, own, left, 0);
        hopper::wgmma_commit();
        hopper::wgmma_wait<0>();
        hopper::settle(part);
        if (own == kOwn - 1) release(ring.stage);
        if (own == 0) scales.multiply();
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          if constexpr (C::kAccumulation == Accumulation::kBlocks) {
            sums[own][i] = fmaf(part[i], scales.of(own, i / 2 % 2), sums[own][i]);
          } else {
            sums[own][i] += part[i];
          }
        }
      }
      scales.next(left > 128);
      ring.next();
    }
  }

  template <int kOwn>
  __device__ __forceinline__ void sum_up(float (&sums)[C::kOwnBlocks][kSums],
                                         const Tile& tile) const {
    if constexpr (C::kAccumulation == Accumulation::kFast) {
      fast<kOwn>(sums, tile.k);
    } else {
      split<kOwn>(sums, tile);
    }
  }

  // Stages go by for a warpgroup that has no rows of this tile.
  __device__ __forceinline__ void look_on(int k) const {
    for (int done = 0; done < k; done += 128) {
      wait_full();
      release(ring.stage);
      ring.next();
    }
  }

  __device__ __forceinline__ void operator()(float (&sums)[C::kOwnBlocks][kSums], int own,
                                             const Tile& tile) const {
    if (own == C::kOwnBlocks && tile.k > 0) return sum_up<C::kOwnBlocks>(sums, tile);
      // What is left is defined: else registers would be kept for what it was.
#pragma unroll
    for (int i = 0; i < C::kOwnBlocks * kSums; ++i) sums[i / kSums][i % kSums] = 0.0F;
    if (tile.k == 0) return end_turn();
    if (own > 0) {
      sum_up<1>(sums, tile);
    } else {
      look_on(tile.k);
    }
  }

  // kBlocks: the products of scales of this thread's rows. They are read when the last step's are
  // no longer needed, and multiplied when the next step's sums are there.
  struct BlockScales {
    static constexpr bool kUsed = C::kAccumulation == Accumulation::kBlocks;
    static constexpr int kRows = kUsed ? 2 * C::kOwnBlocks : 1;
    const Multiplier& m;
    const float* a;
    const float* b;
    int last_row;
    float row_scale[kRows];
    float square_scale;

    __device__ __forceinline__ BlockScales(const Multiplier& of, const Tile& tile)
        : m(of),
          a(of.p.a_scale.values + tile.a_row),
          b(of.p.b_scale.values + tile.group * of.p.b_scale.group_stride +
            tile.col / 128 * of.p.b_scale.stride),
          last_row(tile.rows - 1) {
      if constexpr (kUsed) read();
    }
    __device__ __forceinline__ void read() {
      square_scale = __ldg(b++);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = m.block_of(i / 2) * 64 + m.first_row() + i % 2 * 8;
        row_scale[i] = __ldg(a + min(row, last_row));
      }
      a += m.p.a_scale.stride;
    }
    __device__ __forceinline__ void multiply() {
      if constexpr (kUsed) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) row_scale[i] *= square_scale;
      }
    }
    __device__ __forceinline__ void next(bool more) {
      if constexpr (kUsed) {
        if (more) read();
      }
    }
    __device__ __forceinline__ float of(int own, int second) const {
      return row_scale[own * 2 + second];
    }
  };

  __device__ __forceinline__ int first_row() const {
    return static_cast<int>(threadIdx.x) / 32 % 4 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
  }
};

}  // namespace fp8::core::grouped
