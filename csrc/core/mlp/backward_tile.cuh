// A tile of an MLP's backward (core/quantize/tile.cuh): from gate, up and dh the codes of both
// gradients, row-major and transposed, and h's, transposed. A thread keeps four rows of three
// inputs on their way and three sets of codes: 128 registers, two blocks to a multiprocessor, 24 KB
// of shared memory each for three tiles to turn in.
#pragma once

#include "core/device/device.h"
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

template <typename T, bool kGated>
__device__ __forceinline__ void fetch_tile(const MlpBackwardArgs& a, const UnitTile& at,
                                           UnitInputs<T> (&in)[kRowsPerThread]) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {  // something that exists where there is nothing
    in[r] = fetch_unit<T, kGated>(a.unit, a.dh, a.dh_ld, min(at.row0 + r, a.unit.rows - 1),
                                  min(at.col0, a.unit.features - 8));
  }
}

// h's scale as the forward had it.
__device__ __forceinline__ float h_multiplier(const MlpBackwardArgs& a, bool writes_scale) {
  if (a.h_t.data == nullptr) return 1.0F;
  const GroupScale scale =
      scale_from_amax(__float_as_uint(__ldg(a.h_amax)), E4M3::kMax, a.power_of_two);
  if (writes_scale) *a.h_scale = scale.scale;
  return scale.quant_multiplier;
}

__device__ __forceinline__ void store_rows(const Destination& to, int64_t row0, int64_t col,
                                           const uint2 (&codes)[kRowsPerThread]) {
  if (to.data == nullptr) return;
  uint8_t* out = static_cast<uint8_t*>(to.data) + row0 * to.ld + col;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    if (row0 + r < to.rows) *reinterpret_cast<uint2*>(out) = codes[r];
    out += to.ld;
  }
}

// see(results): called with what is there of each of the thread's rows; it may change them.
// turning: of shared memory, which no thread reads any more.
template <typename T, typename Format, bool kGated, typename See>
__device__ __forceinline__ void cast_unit_tile(const MlpBackwardArgs& a, const UnitTile& at,
                                               const UnitInputs<T> (&in)[kRowsPerThread],
                                               const UnitMultipliers& multipliers,
                                               uint32_t (&turning)[3][kTransposedWords],
                                               const See& see) {
  uint2 gate[kRowsPerThread];
  uint2 up[kRowsPerThread];
  uint2 h[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    UnitResults<T> d = unit_backward<T, kGated>(in[r].gate, in[r].up, in[r].dh, a.unit);
    const bool exists = at.row0 + r < a.unit.rows && at.col0 < a.unit.features;
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
  const auto turn = [&](const Destination& to, const uint2(&codes)[kRowsPerThread], int place) {
    if (to.data != nullptr) {
      store_transposed_tile(to, to.ld, at.row, at.col, codes, turning[place]);
    }
  };
  turn(a.gate_t, gate, 0);
  if constexpr (kGated) turn(a.up_t, up, 1);
  turn(a.h_t, h, 2);
}

template <typename T>
constexpr int kUnitCastBlocks = sizeof(T) == 4 ? 1 : 2;

}  // namespace fp8::core
