// How passes over an MLP's unit share the work, and what they take.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/device/check.h"
#include "fp8/core_mlp.h"
#include "host/launch.h"

namespace fp8::core {

inline void check_unit(const MlpUnitArgs& unit) {
  require(unit.rows > 0 && unit.features > 0 && unit.features % kPad == 0 && unit.ld % 8 == 0,
          "an MLP's unit expects rows, and features in multiples of 16");
  require(unit.gate != nullptr && on_16_bytes(unit.gate) && on_16_bytes(unit.up),
          "an MLP's unit expects 16-byte aligned rows");
  require(unit.up != nullptr || unit.activation != MlpActivation::kClampedSilu,
          "clamped_silu expects a gate and an up");
  require((unit.gate_scale != nullptr) == (unit.up_scale != nullptr),
          "codes of an MLP's unit expect scales of gate and of up");
}

// The amax pass of the backward: a block's 8 warps take turns over the rows of a chunk, two rows at
// a time, 256 columns wide.
struct UnitAmaxPlan {
  int64_t col_tiles = 0;
  int64_t row_chunks = 0;
  int64_t rows_per_chunk = 0;
  int64_t parts = 0;  // results: col_tiles * row_chunks
};

constexpr int64_t kUnitAmaxCols = 256;
constexpr int64_t kUnitAmaxRows = 2 * kWarps;  // in one turn

inline UnitAmaxPlan plan_unit_amax(const MlpUnitArgs& unit, int sm_count) {
  UnitAmaxPlan plan{.col_tiles = ceil_div(unit.features, kUnitAmaxCols)};
  const int64_t blocks = static_cast<int64_t>(sm_count) * 8;
  const int64_t wanted = std::clamp<int64_t>(
      blocks / plan.col_tiles, 1, std::min(ceil_div(unit.rows, kUnitAmaxRows), kMaxGridY));
  plan.rows_per_chunk = round_up(ceil_div(unit.rows, wanted), kUnitAmaxRows);
  plan.row_chunks = ceil_div(unit.rows, plan.rows_per_chunk);
  plan.parts = plan.col_tiles * plan.row_chunks;
  return plan;
}

// The tiles of the backward's cast pass: with those of padding.
struct UnitTiles {
  int64_t cols = 0;
  int64_t rows = 0;
};

inline UnitTiles plan_unit_tiles(const MlpBackwardArgs& args) {
  int64_t rows = args.unit.rows;
  for (const Destination& to : {args.gate, args.up}) {
    if (to.data != nullptr) rows = std::max(rows, to.rows);
  }
  for (const Destination& to : {args.gate_t, args.up_t, args.h_t}) {
    if (to.data != nullptr) rows = std::max(rows, to.ld);
  }
  return {ceil_div(args.unit.features, kTileCols), ceil_div(rows, kTileRows)};
}

}  // namespace fp8::core
