// Tiles of an MLP's backward (core/quantize/tile.cuh): from gate, up and dh the codes of both
// gradients, row-major and transposed, and h's, transposed.
//
// A block takes every so-manyth tile, a few. A thread copies its part of the next tile to
// shared memory (48 KB of a block, bf16) while it computes this one, each row as soon as that of
// this tile has left its place; only the thread itself reads it, so nobody waits for anybody. A
// further 24 KB are for three tiles to turn in. Gate and up as codes take 40 KB.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "core/device/device.h"
#include "core/device/dispatch.cuh"
#include "core/device/shared_memory.h"
#include "core/mlp/plan.h"
#include "core/mlp/unit.cuh"
#include "core/quantize/tile.cuh"

namespace fp8::core {

struct BackwardParams {
  MlpBackwardArgs args;
  unsigned col_tiles;
  unsigned row_tiles;
  // Tensorwise: what the amax pass leaves, [parts] each.
  UnitAmaxPlan plan;
  uint32_t* gate_amax;
  uint32_t* up_amax;
  // Delayed, by tile; what CastParams has. up's follow gate's.
  uint2* tile_report;        // [2, tiles]
  uint32_t* tile_guess;      // [2, tiles]
  uint32_t* history_before;  // [2, kAmaxHistorySize]
};

// Scales that are delayed, in mlp_backward_delayed.cu.
void launch_backward_delayed(BackwardParams params, const DeviceInfo& device, cudaStream_t stream);
size_t delayed_workspace_words(const MlpBackwardArgs& args);

// A scale for each row and column, in mlp_backward_rowwise.cu.
void launch_backward_rowwise(const BackwardParams& params, const DeviceInfo& device,
                             cudaStream_t stream);
size_t rowwise_workspace_words(const MlpBackwardArgs& args, const UnitAmaxPlan& plan);

struct UnitMultipliers {
  float gate = 1.0F;
  float up = 1.0F;
  float h = 1.0F;
};

struct UnitTile {
  int64_t row;  // of the tile
  int64_t col;
  int64_t row0;  // of the thread
  int64_t col0;

  __device__ __forceinline__ UnitTile(int64_t strip, int64_t tile_col)
      : row(strip * kTileRows),
        col(tile_col * kTileCols),
        row0(row + threadIdx.x / kColGroups * kRowsPerThread),
        col0(col + threadIdx.x % kColGroups * 8) {}
};

// A thread's part of a tile as copies have it: within the matrix, in numbers that take one
// instruction to multiply.
struct PartStart {
  uint32_t row;
  uint32_t col;

  __device__ __forceinline__ PartStart(const UnitTile& at, const MlpUnitArgs& unit)
      : row(static_cast<uint32_t>(at.row0)),
        col(static_cast<uint32_t>(min(at.col0, unit.features - 8))) {}
};

// The place of a tile for a pass that goes from below: the pass before it ended there, and part of
// its input is in L2 still.
template <typename Params>
__device__ __forceinline__ UnitTile from_below(const Params& p, unsigned tile) {
  return UnitTile(p.row_tiles - 1 - tile / p.col_tiles, tile % p.col_tiles);
}

// A thread's part of tiles: in shared memory, four rows of gate, dh and up. Codes of gate and up
// lie in one quad, before dh, and the scales of the rows behind all quads.
template <typename Reads>
class TileInputs {
  using T = typename Reads::Element;
  static constexpr bool kGated = Reads::kGated;
  static constexpr bool kCodes = Reads::kCodes;
  static_assert(kGated || !kCodes);
  static constexpr int kQuadsPerRow = kCodes ? 1 + kQuads<T> : (kGated ? 3 : 2) * kQuads<T>;
  static constexpr int kQuadsOfBlock = kRowsPerThread * kQuadsPerRow * kThreads;

 public:
  static constexpr int kBytes =  // of a block
      kQuadsOfBlock * 16 + (kCodes ? kRowsPerThread * kThreads * 8 : 0);

  // Begins to copy `first`, the first of the block's tiles.
  __device__ __forceinline__ TileInputs(const MlpBackwardArgs& args, uint4* shared,
                                        const UnitTile& first)
      : args_(args),
        own_(shared + threadIdx.x),
        own_scales_(reinterpret_cast<float2*>(shared + kQuadsOfBlock) + threadIdx.x) {
    const PartStart start = start_of(first);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) copy(start, r);
    __pipeline_commit();
  }

  __device__ __forceinline__ PartStart start_of(const UnitTile& at) const {
    return PartStart(at, args_.unit);
  }
  // Begins to copy row r of the thread's part of a tile; what lies at the edge where there is none.
  __device__ __forceinline__ void copy(const PartStart& start, int r) const {
    const uint32_t row = min(start.row + r, static_cast<uint32_t>(args_.unit.rows - 1));
    const auto place_in = [&](int64_t ld) {
      return static_cast<uint64_t>(row) * static_cast<uint32_t>(ld) + start.col;
    };
    uint4* to = own_ + r * kQuadsPerRow * kThreads;
    const auto copy8 = [&](const void* from, int64_t ld) {
      const T* eight = static_cast<const T*>(from) + place_in(ld);
#pragma unroll
      for (int quad = 0; quad < kQuads<T>; ++quad) {
        __pipeline_memcpy_async(to, reinterpret_cast<const uint4*>(eight) + quad, 16);
        to += kThreads;
      }
    };
    if constexpr (kCodes) {
      const uint64_t place = place_in(args_.unit.ld);
      auto* halves = reinterpret_cast<uint2*>(to);
      float2* scales = own_scales_ + r * kThreads;
      __pipeline_memcpy_async(halves, static_cast<const uint8_t*>(args_.unit.gate) + place, 8);
      __pipeline_memcpy_async(halves + 1, static_cast<const uint8_t*>(args_.unit.up) + place, 8);
      __pipeline_memcpy_async(&scales->x, args_.unit.gate_scale + row, 4);
      __pipeline_memcpy_async(&scales->y, args_.unit.up_scale + row, 4);
      to += kThreads;
    } else {
      copy8(args_.unit.gate, args_.unit.ld);
    }
    if (args_.dh != nullptr) copy8(args_.dh, args_.dh_ld);
    if constexpr (kGated && !kCodes) {
      if (args_.dh == nullptr) to += kQuads<T> * kThreads;
      copy8(args_.unit.up, args_.unit.ld);
    }
  }
  // After all copies; dh is zeros where there is none.
  __device__ __forceinline__ UnitInputs<T> take(int r) const {
    UnitInputs<T> in;
    if constexpr (kCodes) {
      const uint4 codes = own_[r * kQuadsPerRow * kThreads];
      const float2 scales = own_scales_[r * kThreads];
      in.gate = decode8<T>(make_uint2(codes.x, codes.y), scales.x);
      in.up = decode8<T>(make_uint2(codes.z, codes.w), scales.y);
    } else {
      in.gate = take8(r, 0);
      if constexpr (kGated) in.up = take8(r, 2 * kQuads<T>);
    }
    in.dh = args_.dh == nullptr ? zero8<T>() : take8(r, kCodes ? 1 : kQuads<T>);
    return in;
  }

 private:
  __device__ __forceinline__ Vec8<T> take8(int r, int first) const {
    const uint4* from = own_ + (r * kQuadsPerRow + first) * kThreads;
    Vec8<T> v;
#pragma unroll
    for (int quad = 0; quad < kQuads<T>; ++quad) {
      const uint4 q = from[quad * kThreads];
      v.words[4 * quad] = q.x;
      v.words[4 * quad + 1] = q.y;
      v.words[4 * quad + 2] = q.z;
      v.words[4 * quad + 3] = q.w;
    }
    return v;
  }

  const MlpBackwardArgs& args_;
  uint4* own_;
  float2* own_scales_;
};

// f(tile, take) for each of the block's tiles, every gridDim.x-th: take(r) is row r of the thread's
// part, once each, in order. place(tile): where it lies; `inputs` were made with the first one's.
template <typename Reads, typename Place, typename F>
__device__ __forceinline__ void for_tiles(const TileInputs<Reads>& inputs, unsigned tiles,
                                          const Place& place, const F& f) {
  for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const unsigned next = tile + gridDim.x;
    const PartStart start = inputs.start_of(place(min(next, tiles - 1)));
    __pipeline_wait_prior(0);
    f(tile, [&](int r) {
      const auto in = inputs.take(r);
      if (next < tiles) inputs.copy(start, r);
      if (r == kRowsPerThread - 1) __pipeline_commit();
      return in;
    });
    if (next < tiles) __syncthreads();  // this tile has left the shared memory that it turned in
  }
}

// A few tiles to a block: some multiprocessors are faster than others, and take more blocks then.
constexpr int64_t kTilesOfBlock = 6;

// Launches a kernel of such blocks. most_tiles: of a block, as long as the GPU is full.
template <auto kKernel, typename Inputs, typename Params>
void launch_tiles(int64_t tiles, int blocks_per_sm, const DeviceInfo& device, cudaStream_t stream,
                  const Params& params, bool pdl, int64_t most_tiles = kTilesOfBlock) {
  constexpr int kStaticBytes = 28 * 1024;  // tiles that turn, and scales
  static std::array<std::atomic<int>, kMaxDevices> known{};
  shared_memory_of(reinterpret_cast<const void*>(kKernel), known, kStaticBytes);
  const int64_t at_a_time = static_cast<int64_t>(device.sm_count) * blocks_per_sm;
  const int64_t each = std::clamp<int64_t>(ceil_div(tiles, at_a_time), 1, most_tiles);
  launch(kKernel, static_cast<unsigned>(ceil_div(tiles, each)), kThreads, stream, params,
         {.pdl = pdl, .shared_bytes = Inputs::kBytes});
}

// h's scale as the forward had it.
__device__ __forceinline__ float h_multiplier(const MlpBackwardArgs& a, bool writes_scale) {
  if (a.h_t.data == nullptr) return 1.0F;
  const GroupScale scale =
      scale_from_amax(__float_as_uint(__ldg(a.h_amax)), E4M3::kMax, a.power_of_two);
  if (writes_scale) *a.h_scale = scale.scale;
  return scale.quant_multiplier;
}

// How many of a thread's rows are below `rows`.
__device__ __forceinline__ int rows_there(int64_t row0, int64_t rows) {
  return static_cast<int>(min(max(rows - row0, int64_t{0}), int64_t{kRowsPerThread}));
}

__device__ __forceinline__ void store_rows(const Destination& to, int64_t row0, int64_t col,
                                           const uint2 (&codes)[kRowsPerThread]) {
  if (to.data == nullptr) return;
  const int there = rows_there(row0, to.rows);
  uint8_t* out = static_cast<uint8_t*>(to.data) + row0 * to.ld + col;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    if (r < there) *reinterpret_cast<uint2*>(out) = codes[r];
    out += to.ld;
  }
}

// Codes of the three, transposed, where they are wanted. turning: of shared memory, which no thread
// reads any more. `up` is not read where there is none.
template <bool kGated>
__device__ __forceinline__ void store_transposed(const MlpBackwardArgs& a, const UnitTile& at,
                                                 const uint2 (&gate)[kRowsPerThread],
                                                 const uint2 (&up)[kRowsPerThread],
                                                 const uint2 (&h)[kRowsPerThread],
                                                 uint32_t (&turning)[3][kTransposedWords]) {
  const auto turn = [&](const Destination& to, const uint2(&codes)[kRowsPerThread], int place) {
    if (to.data != nullptr) {
      store_transposed_tile(to, to.ld, at.row, at.col, codes, turning[place]);
    }
  };
  turn(a.gate_t, gate, 0);
  if constexpr (kGated) turn(a.up_t, up, 1);
  turn(a.h_t, h, 2);
}

// take(r): as for_tiles has it. see(results): called with what is there of each of the thread's
// rows; it may change them. turning: as store_transposed has it.
template <typename T, typename Format, bool kGated, typename Act, typename Take, typename See>
__device__ __forceinline__ void cast_unit_tile(const MlpBackwardArgs& a, const UnitTile& at,
                                               const Take& take, const UnitMultipliers& multipliers,
                                               uint32_t (&turning)[3][kTransposedWords],
                                               const See& see) {
  uint2 gate[kRowsPerThread];
  uint2 up[kRowsPerThread];
  uint2 h[kRowsPerThread];
  const int there = at.col0 < a.unit.features ? rows_there(at.row0, a.unit.rows) : 0;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const UnitInputs<T> in = take(r);
    UnitResults<T> d = unit_backward<T, kGated, Act>(in.gate, in.up, in.dh, a.unit);
    const bool exists = r < there;
    if (exists) see(d);
    const int valid = exists ? 8 : 0;
    gate[r] = keep_first(encode8<Format>(d.gate, [&](int) { return multipliers.gate; }), valid);
    if constexpr (kGated) {
      up[r] = keep_first(encode8<Format>(d.up, [&](int) { return multipliers.up; }), valid);
    }
    h[r] = keep_first(encode8<E4M3>(d.h, [&](int) { return multipliers.h; }), valid);
  }
  if (at.col0 < a.unit.features) {
    store_rows(a.gate, at.row0, at.col0, gate);
    if constexpr (kGated) store_rows(a.up, at.row0, at.col0, up);
  }
  store_transposed<kGated>(a, at, gate, up, h, turning);
}

// Blocks to a multiprocessor, as their registers allow. kFewerBlocks: of kernels that keep more of
// a tile than codes.
template <typename T, bool kGated, typename Act>
constexpr int kFewerBlocks =
    sizeof(T) == 4 || (kGated && std::is_same_v<Act, AnyActivation>) ? 1 : 2;
template <typename T, typename Act>
constexpr int kUnitCastBlocks = sizeof(T) == 4                       ? 1
                                : std::is_same_v<Act, AnyActivation> ? 2
                                                                     : 3;

}  // namespace fp8::core
