// amax and cast in one launch: what fits on the chip stays there between the two.
//
// Two blocks to a multiprocessor take a matrix's tiles in turn, through a ring of slots in shared
// memory (tile_ring.cuh). The first time they keep maxima alone. After a barrier of the whole grid
// they have the scales and cast, the tiles backwards: those of the last slots are still there,
// those before them partly in L2. So a bf16 tensor of up to 25 MB is read from memory once, 2 + 1
// (+ 1) bytes an element instead of 4 + 1 (+ 1), a larger one in part.
//
// Maxima per row and column are joined in L2, by atomics: a maximum does not depend on the order.
#include <cooperative_groups.h>

#include <array>
#include <atomic>

#include "common/device.h"
#include "quantize/dispatch.cuh"
#include "quantize/kernels.h"
#include "quantize/tile_ring.cuh"

namespace fp8::core {
namespace {

// Slots, two buffers for tiles on their way to data_t, and the multipliers of a tile's rows and
// columns: two blocks of them fill a multiprocessor of Hopper.
constexpr int kMultipliers = static_cast<int>(kTileRows + kTileCols);
constexpr int kSharedBytes = kSlotBytes + (2 * kTurnedWords + kMultipliers) * 4;

__device__ __forceinline__ uint32_t max_across(uint32_t value, int first_lane_bit,
                                               int last_lane_bit) {
#pragma unroll
  for (int bit = first_lane_bit; bit <= last_lane_bit; bit *= 2) {
    value = max(value, __shfl_xor_sync(0xFFFFFFFFU, value, bit));
  }
  return value;
}

// Raises row_amax and col_amax, where they are given, to the maxima of a tile. Eight neighbouring
// lanes have a row together, every eighth lane a column.
template <typename T>
__device__ __forceinline__ void raise_maxima(const Vec8<T> (&v)[kRowsPerThread], int64_t row,
                                             int64_t col, const ResidentParams& p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (p.row_amax != nullptr) {
    const int which = lane % kColGroups;  // of the thread's rows, the one that this lane writes
    uint32_t mine = 0;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const uint32_t bits = max_across(amax_bits(v[r]), 1, kColGroups / 2);
      if (r == which) mine = bits;
    }
    if (which < kRowsPerThread && row + which < p.cast.rows) {
      atomicMax(p.row_amax + row + which, mine);
    }
  }
  PackedAmax<T> of_columns;
  of_columns.clear();
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) of_columns.update(v[r]);
  // Of its eight columns a lane writes the two of its place among the four lanes that have them.
  constexpr int kPerLane = 8 * kColGroups / 32;
  const int place = lane / kColGroups;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t bits = max_across(of_columns.float_bits(j), kColGroups, 16);
    if (j / kPerLane == place && col + j < p.cast.cols) atomicMax(p.col_amax + col + j, bits);
  }
}

// Multipliers of a tile's rows and columns, a thread each: their maxima are loaded ahead.
struct TileScales {
  const ResidentParams& p;
  float* multipliers;  // [kTileRows] of rows, [kTileCols] of columns
  bool of_row = threadIdx.x < kTileRows;
  bool any = threadIdx.x < kMultipliers;
  int offset = static_cast<int>(threadIdx.x) - (of_row ? 0 : static_cast<int>(kTileRows));

  __device__ __forceinline__ uint32_t load(int64_t row0, int64_t col0) const {
    const uint32_t* maxima = of_row ? p.row_amax : p.col_amax;
    const int64_t at = (of_row ? row0 : col0) + offset;
    if (!any || maxima == nullptr || at >= (of_row ? p.cast.rows : p.cast.cols)) return 0;
    return __ldcg(maxima + at);
  }
  // The first tile of a row or column of tiles writes the scales.
  __device__ __forceinline__ void store(uint32_t bits, int64_t row0, int64_t col0,
                                        float format_max) const {
    if (!any) return;
    const GroupScale group = scale_from_amax(bits, format_max, p.cast.power_of_two);
    multipliers[threadIdx.x] = group.quant_multiplier;
    if (of_row) {
      const int64_t row = row0 + offset;
      if (col0 == 0 && p.row_amax != nullptr && row < p.cast.data.rows) {
        p.cast.scale[row] = group.scale;
      }
    } else if (row0 == 0 && col0 + offset < p.cast.data_t.rows) {
      p.cast.scale_t[col0 + offset] = group.scale;
    }
  }
};

template <typename T, typename Format, Granularity kGranularity, bool kData, bool kDataT>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    resident_kernel(const ResidentParams p) {
  constexpr bool kRowwise = kGranularity == Granularity::kRowwise;
  constexpr int kLast = kSlots<T> - 1;
  extern __shared__ uint4 shared[];
  uint32_t* turned = reinterpret_cast<uint32_t*>(shared + kSlotBytes / 16);
  uint32_t* scratch = turned;  // not in use at the same time
  const CastParams& c = p.cast;
  const Tiles<T> tiles(p, shared);
  const TileScales scales{p, reinterpret_cast<float*>(turned + 2 * kTurnedWords)};

#pragma unroll 1
  for (int i = 0; i <= kLast; ++i) {
    if (i < tiles.count) tiles.copy(i, i, tiles.hint(i));
    __pipeline_commit();
  }
  if constexpr (kRowwise) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t i = first; kData && i < c.rows; i += stride) p.row_amax[i] = 0;
    for (int64_t i = first; i < c.cols; i += stride) p.col_amax[i] = 0;
    cooperative_groups::this_grid().sync();
  }
  [[maybe_unused]] PackedAmax<T> amax;
  amax.clear();
  int slot = 0;
#pragma unroll 1
  for (int i = 0; i < tiles.count; ++i) {
    __pipeline_wait_prior(kLast);
    Vec8<T> v[kRowsPerThread];
    tiles.take(slot, v);
    if constexpr (kRowwise) {
      raise_maxima(v, tiles.row0(i) + tiles.row_in_tile, tiles.col0(i) + tiles.col_in_tile, p);
    } else {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) amax.update(v[r]);
    }
    const int next = i + kSlots<T>;
    if (next < tiles.count) tiles.copy(next, slot, tiles.hint(next));
    __pipeline_commit();
    slot = slot == kLast ? 0 : slot + 1;
  }
  __pipeline_wait_prior(0);

  if constexpr (!kRowwise) {
    const uint32_t bits = block_max<kWarps>(amax.max_float_bits(), scratch);
    if (threadIdx.x == 0) p.tensor_amax[blockIdx.x] = bits;
  }
  cooperative_groups::this_grid().sync();
  let_next_start();
  float tensor = 0.0F;
  uint32_t ahead = 0;
  if constexpr (kRowwise) {
    ahead = scales.load(tiles.row0(tiles.count - 1), tiles.col0(tiles.count - 1));
  } else {
    tensor = tensor_multiplier(c, Format::kMax, scratch);
    __syncthreads();
  }

#pragma unroll 1
  for (int i = tiles.count - 1; i >= 0; --i) {
    slot = slot == 0 ? kLast : slot - 1;
    __pipeline_wait_prior(kLast);
    Vec8<T> v[kRowsPerThread];
    tiles.take(slot, v);
    const int64_t row0 = tiles.row0(i);
    const int64_t col0 = tiles.col0(i);
    const int64_t row = row0 + tiles.row_in_tile;
    const int64_t col = col0 + tiles.col_in_tile;
    if (i > kLast) tiles.copy(i - kSlots<T>, slot, L2::kFirstToGo);
    __pipeline_commit();
    if constexpr (kRowwise) {
      // Nobody reads the last tile's any more: there was a barrier since.
      scales.store(ahead, row0, col0, Format::kMax);
      if (i > 0) ahead = scales.load(tiles.row0(i - 1), tiles.col0(i - 1));
      __syncthreads();
    }
    uint2 codes[kRowsPerThread];
    if constexpr (kData || !kRowwise) {
      uint8_t* out = static_cast<uint8_t*>(c.data.data) + row * c.data.ld + col;
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        float multiplier = tensor;
        if constexpr (kRowwise) multiplier = scales.multipliers[tiles.row_in_tile + r];
        codes[r] = keep_first(encode8<Format>(v[r], [&](int) { return multiplier; }),
                              tiles.valid(row, col, r));
        if constexpr (kData) {
          if (row + r < c.data.rows && col < c.data.ld) *reinterpret_cast<uint2*>(out) = codes[r];
          out += c.data.ld;
        }
      }
    }
    if constexpr (kRowwise) {
      const float* of_columns = scales.multipliers + kTileRows + tiles.col_in_tile;
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        codes[r] = keep_first(encode8<Format>(v[r], [&](int j) { return of_columns[j]; }),
                              tiles.valid(row, col, r));
      }
    }
    if constexpr (kDataT) {
      // Of two buffers in turn: the barrier between write and read of one frees the other.
      store_turned_tile(c.data_t, row0, col0, codes, turned + i % 2 * kTurnedWords);
    }
  }
}

// Whether a multiprocessor holds as many blocks as the plan counts on: asked once for a kernel and
// device. No multiprocessor does that has less shared memory than Hopper's.
bool can_be_resident(const void* kernel, int device,
                     std::array<std::atomic<int>, kMaxDevices>& known) {
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    int blocks = 0;
    const bool fits = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           kSharedBytes) == cudaSuccess &&
                      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared) == cudaSuccess &&
                      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads,
                                                                    kSharedBytes) == cudaSuccess;
    if (!fits) cudaGetLastError();  // an answer, not an error
    answer = blocks >= kResidentBlocks ? 1 : -1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer > 0;
}

template <typename T, typename Format, Granularity kGranularity, bool kData, bool kDataT>
bool launch_typed(const ResidentParams& params, int device, cudaStream_t stream) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  const auto kernel = resident_kernel<T, Format, kGranularity, kData, kDataT>;
  if (!can_be_resident(reinterpret_cast<const void*>(kernel), device, known)) return false;
  return launch_cooperative(kernel, params.plan.blocks, kThreads, kSharedBytes, stream, params);
}

}  // namespace

bool launch_resident(const ResidentParams& params, Dtype x_dtype, Dtype dtype,
                     Granularity granularity, int device, cudaStream_t stream) {
  constexpr auto kTensorwise = Granularity::kTensorwise;
  constexpr auto kRowwise = Granularity::kRowwise;
  const bool data = params.cast.data.data != nullptr;
  const bool data_t = params.cast.data_t.data != nullptr;
  bool launched = false;
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      using T = typename decltype(input)::type;
      using Format = typename decltype(format)::type;
      if (granularity == kRowwise) {
        launched = data ? launch_typed<T, Format, kRowwise, true, true>(params, device, stream)
                        : launch_typed<T, Format, kRowwise, false, true>(params, device, stream);
      } else if (!data_t) {
        launched = launch_typed<T, Format, kTensorwise, true, false>(params, device, stream);
      } else {
        launched = data ? launch_typed<T, Format, kTensorwise, true, true>(params, device, stream)
                        : launch_typed<T, Format, kTensorwise, false, true>(params, device, stream);
      }
    });
  });
  return launched;
}

}  // namespace fp8::core
