// Grouped FP8 products for Hopper: TMA, wgmma, persistent blocks, one warpgroup that loads and two
// that multiply.
//
//   rows:    out[r, :] = a[r, :] b[g]^T       r in group g; a [rows, k], b [groups, n, k]
//   columns: out[g] = a[:, L] b[:, L]^T       L = the columns of group g; a [m, cols], b [n, cols]
//
// Where groups begin is read here, from `offsets`; the tensor maps span all groups. A load that
// runs past a group's rows brings other rows, whose results are not stored; a contraction ends at
// multiples of 32 columns, one wgmma. What lies beyond a matrix is loaded as zeros.
//
// A tile is kBlocks * 64 rows of a by kN rows of b (of out: rows by columns). Blocks of 64 rows
// that a group does not have are neither loaded nor multiplied. Bound by the tensor cores (and,
// there, by power) for large groups, by reading b for small ones. Clusters of two blocks of threads
// that share their loads of a were 1.5 times slower: every stage waits for both.
#pragma once

#include "core/device/hopper.cuh"
#include "core/matmul/grouped_config.cuh"
#include "core/matmul/grouped_store.cuh"
#include "core/matmul/grouped_sums.cuh"
#include "core/matmul/grouped_tiles.cuh"

namespace fp8::core::grouped {

// One thread loads every stage of the block's tiles, in their order.
template <typename C>
__device__ __forceinline__ void load_tiles(const Params& p, const Shared<C>& shared) {
  hopper::prefetch_map(&p.a);
  hopper::prefetch_map(&p.b);
  Ring<C::kStages> ring;
  const bool loads = threadIdx.x % 32 == 0;
  TileWalk<C::kM, C::kN, C::kColumns> walk(p.grid);
  Tile tile;
  for (int index = blockIdx.x; walk.find(index, tile); index += gridDim.x) {
    const int blocks = min((tile.rows + 63) / 64, C::kBlocks);
    const int b_row = C::kColumns ? tile.col : tile.group * p.grid.cols + tile.col;
    const uint32_t bytes = blocks * C::kBlockBytes + C::kN * 128;
    const int end = tile.begin_k + tile.k;
    for (int k = tile.begin_k; k < end; k += 128) {
      hopper::wait(shared.empty(ring.stage), ring.parity ^ 1);
      if (loads) {
        const uint32_t full = shared.full(ring.stage);
        hopper::arrive_expecting(full, bytes);
        hopper::load_box(&p.b, full, shared.b(ring.stage), k, b_row);
#pragma unroll
        for (int i = 0; i < C::kBlocks; ++i) {
          if (i < blocks) {
            hopper::load_box(&p.a, full, shared.a(ring.stage, i), k, tile.a_row + i * 64);
          }
        }
      }
      __syncwarp();
      ring.next();
    }
  }
}

template <typename C>
__device__ __forceinline__ void multiply_tiles(const Params& p, const Shared<C>& shared,
                                               uint8_t* memory) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
  const int thread = threadIdx.x % 128;
  const int warp = thread / 32;
  Ring<C::kStages> ring;
  Multiplier<C> multiply{p, shared, ring, warpgroup};
  auto* sb = reinterpret_cast<float*>(memory + C::kScalesAt) + warpgroup * C::kN;
  const uint32_t staging = shared.base + C::kStagingAt + (warpgroup * 4 + warp) * C::kStagingBytes;
  constexpr bool kScaledLast = C::kAccumulation != Accumulation::kBlocks;

  TileWalk<C::kM, C::kN, C::kColumns> walk(p.grid);
  Tile tile;
  int turn = 0;  // whose, where each warpgroup has tiles of its own
  if (warpgroup == 1) multiply.end_turn();
  for (int index = blockIdx.x; walk.find(index, tile); index += gridDim.x, turn ^= 1) {
    if (C::kPingPong && turn != warpgroup) {
      ring.skip((tile.k + 127) / 128);
      continue;
    }
    const int blocks = min((tile.rows + 63) / 64, C::kBlocks);
    const int own = C::kPingPong ? blocks : (blocks - warpgroup + 1) / 2;
    // Scales are on their way while the products run.
    float col_scale[C::kN / 128];
    float row_scale[C::kOwnBlocks][2];
    const float* a_scale =
        p.a_scale.values + tile.group * p.a_scale.group_stride + tile.a_row * p.a_scale.stride;
    const float* b_scale = p.b_scale.values + tile.group * p.b_scale.group_stride;
    if constexpr (kScaledLast) {
#pragma unroll
      for (int i = 0; i < C::kN / 128; ++i) {
        const int c = tile.col + i * 128 + thread;
        col_scale[i] = c < p.grid.cols ? __ldg(b_scale + c * p.b_scale.stride) : 0.0F;
      }
#pragma unroll
      for (int i = 0; i < C::kOwnBlocks * 2; ++i) {
        const int r = multiply.block_of(i / 2) * 64 + multiply.first_row() + i % 2 * 8;
        row_scale[i / 2][i % 2] = r < tile.rows ? __ldg(a_scale + r * p.a_scale.stride) : 0.0F;
      }
    }
    float sums[C::kOwnBlocks][C::kN / 2];
    multiply.wait_for_turn();
    multiply(sums, own, tile);
    hopper::sync_threads<128>(1 + warpgroup);  // the last tile's scales have been read
#pragma unroll
    for (int i = 0; i < C::kN / 128; ++i) sb[i * 128 + thread] = kScaledLast ? col_scale[i] : 1.0F;
    hopper::sync_threads<128>(1 + warpgroup);
#pragma unroll
    for (int i = 0; i < C::kOwnBlocks; ++i) {
      const int row = multiply.block_of(i) * 64 + warp * 16;
      if (row >= tile.rows) continue;
#pragma unroll
      for (int j = 0; j < C::kN / 128; ++j) {
        const OutBlock block{
            .rows = tile.rows - row,
            .cols = p.grid.cols - tile.col - j * 128,
            .at = tile.group * p.group_out + (tile.out_row + row) * p.ld_out + tile.col + j * 128,
            .sb = sb + j * 128,
            .sa = {kScaledLast ? row_scale[i][0] : 1.0F, kScaledLast ? row_scale[i][1] : 1.0F}};
        if (p.out_bytes == 4) {
          store_fp32(p, block, sums[i] + j * 64);
        } else if (p.out_half) {
          store_16bit<__half>(p, block, sums[i] + j * 64, staging);
        } else {
          store_16bit<__nv_bfloat16>(p, block, sums[i] + j * 64, staging);
        }
      }
    }
  }
  if (turn == warpgroup) multiply.wait_for_turn();  // so that arrivals and waits match
}

template <typename C>
__global__ void __launch_bounds__(kMmThreads, 1)
    grouped_mm_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Shared<C> shared{hopper::shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      hopper::init_barrier(shared.full(i), 1);
      hopper::init_barrier(shared.empty(i), C::kPingPong ? 4 : 8);  // warps that read it
    }
    hopper::fence_barrier_init();
  }
  if constexpr (C::kColumns) {
    if (threadIdx.x < 256) reinterpret_cast<uint32_t*>(memory + C::kZerosAt)[threadIdx.x] = 0;
    hopper::fence_shared();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    hopper::give_registers<40>();
    if (threadIdx.x < 32) load_tiles<C>(p, shared);
  } else {
    hopper::take_registers<232>();
    multiply_tiles<C>(p, shared, memory);
  }
}

}  // namespace fp8::core::grouped
