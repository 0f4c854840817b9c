// Second launch of a delayed quantization: was the scale of earlier calls good for this x?
//
// Every block adds up what the cast pass left of each tile, 8 bytes for 8192 elements, and comes to
// the same answer by the rule in fp8/core.h. As a rule it is yes, and the launch is over: two to
// three microseconds, of which the start overlaps the cast pass. Else the blocks cast x again, a
// tile after the other.
#include "quantize/dispatch.cuh"
#include "quantize/kernels.h"
#include "quantize/tile.cuh"

namespace fp8::core {
namespace {

// amax and fingerprint of all tiles, in every thread. scratch: two words a warp.
__device__ __forceinline__ uint2 whole_report(const uint2* tiles, int64_t count,
                                              uint32_t* scratch) {
  constexpr int kBatch = 4;
  uint2 all{0, 0};
  for (int64_t begin = threadIdx.x; begin < count; begin += kBatch * kThreads) {
    uint2 batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t tile = begin + i * kThreads;
      batch[i] = tile < count ? __ldcg(tiles + tile) : uint2{0, 0};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) all = {max(all.x, batch[i].x), all.y + batch[i].y};
  }
  all.y = warp_add(all.y);
  if (threadIdx.x % 32 == 0) scratch[kWarps + threadIdx.x / 32] = all.y;
  all.x = block_max<kWarps>(all.x, scratch);  // with the barrier for both
  all.y = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) all.y += scratch[kWarps + i];
  return all;
}

// What the newest record of the same amax and fingerprint used, as bits; else one of the same amax
// whose call took that at once. The oldest place of the ring is left out: the first block writes
// this call's record there, while others may still be looking.
__device__ __forceinline__ bool find_record(const CastParams& p, const uint2& own, uint32_t* used) {
  static_assert(kAmaxRecords % 32 == 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool taken_at_once = false;
  for (int newer = 0; newer < kAmaxRecords; newer += 32) {
    const int ago = newer + lane + 1;
    const uint32_t* record = p.history + slot_before(p.history_slot, ago);
    const bool same_amax = ago < kAmaxRecords && __ldcg(record) == own.x;
    const uint32_t print = __ldcg(record + kHistoryFingerprint);
    const unsigned found = __ballot_sync(0xFFFFFFFFU, same_amax && print == own.y);
    taken_at_once |= __any_sync(0xFFFFFFFFU, same_amax && print == 0);
    if (found != 0) {
      *used = __shfl_sync(0xFFFFFFFFU, __ldcg(record + kHistoryUsed), __ffs(found) - 1);
      return true;
    }
  }
  if (taken_at_once) *used = own.x;
  return taken_at_once;
}

template <typename T, typename Format, bool kData, bool kDataT>
__global__ void __launch_bounds__(kThreads, 2) settle_delayed_kernel(const CastParams p) {
  let_next_start();
  __shared__ alignas(16) uint32_t turned[kDataT ? kTurnedWords : 1];
  __shared__ uint32_t scratch[2 * kWarps];
  wait_for_previous();

  const int64_t tiles = p.plan.col_tiles * p.plan.row_tiles;
  const uint32_t expected = __ldcg(p.expected);
  const uint2 own = whole_report(p.tile_report, tiles, scratch);
  uint32_t used = expected;
  const bool known = find_record(p, own, &used);
  if (!known && !suits(__uint_as_float(expected), __uint_as_float(own.x))) used = own.x;
  if (!p.recomputes && blockIdx.x == 0 && threadIdx.x == 0) {
    uint32_t* record = p.history + p.history_slot;
    record[0] = own.x;
    record[kHistoryUsed] = used;
    record[kHistoryFingerprint] = own.y;
  }
  if (used == expected) return;

  const float multiplier = multiplier_of(p, used, Format::kMax);
  const MatrixSource<T> source = matrix_source<T>(p);
  const int group = static_cast<int>(threadIdx.x) / kColGroups;
  const int col_group = static_cast<int>(threadIdx.x) % kColGroups;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t tile_row = tile / p.plan.col_tiles * kTileRows;
    const int64_t col0 = tile % p.plan.col_tiles * kTileCols;
    const int64_t row0 = tile_row + group * kRowsPerThread;
    const int64_t col = col0 + col_group * 8;
    const int valid_cols = of_eight(p.cols - col);
    Vec8<T> v[kRowsPerThread];
    load_tile(source, row0, p.rows - row0, col, valid_cols, v);
    uint2 codes[kRowsPerThread];
    uint8_t* out = static_cast<uint8_t*>(p.data.data) + row0 * p.data.ld + col;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      infinite_to_nan(v[r]);
      codes[r] = keep_first(encode8<Format>(v[r], [&](int) { return multiplier; }),
                            row0 + r < p.rows ? valid_cols : 0);
      if constexpr (kData) {
        if (row0 + r < p.data.rows && col < p.data.ld) *reinterpret_cast<uint2*>(out) = codes[r];
        out += p.data.ld;
      }
    }
    if constexpr (kDataT) {
      __syncthreads();  // the tile before has left
      store_turned_tile(p.data_t, p.data_t.ld, tile_row, col0, codes, turned);
    }
  }
}

}  // namespace

void launch_settle_delayed(const CastParams& params, unsigned blocks, Dtype x_dtype, Dtype dtype,
                           cudaStream_t stream) {
  const bool data = params.data.data != nullptr;
  const bool data_t = params.data_t.data != nullptr;
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      using T = typename decltype(input)::type;
      using Format = typename decltype(format)::type;
      const auto go = [&](auto kernel) {
        launch(kernel, blocks, kThreads, stream, params,
               {.overlaps_previous = params.overlaps_previous});
      };
      if (data && data_t) {
        go(settle_delayed_kernel<T, Format, true, true>);
      } else if (data_t) {
        go(settle_delayed_kernel<T, Format, false, true>);
      } else {
        go(settle_delayed_kernel<T, Format, true, false>);
      }
    });
  });
}

}  // namespace fp8::core
