// What a grouped product's kernel is told, and the kernels there are: between grouped_mm.cpp, which
// decides, and grouped_*.cu, which have them compiled.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "host/grouped_plan.h"

namespace fp8::core::grouped {

struct TileGrid {
  const int32_t* offsets;  // [groups], ends; clamped to [0, limit]. null: one group, of all
  int groups;
  int limit;
  int rows;  // of each group's result, where groups are columns
  int cols;  // of the result
  int k;     // contracted, where groups are rows
};

struct Scales {
  const float* values;
  int64_t group_stride;
  // Between rows. In blocks: a's from one 128 of the contraction to the next; b's from one row of
  // squares to the next.
  int64_t stride;
};

struct Params {
  CUtensorMap a;
  CUtensorMap b;
  TileGrid grid;
  Scales a_scale;
  Scales b_scale;
  void* out;
  int64_t ld_out;
  int64_t group_out;  // elements from one group's result to the next
  int out_bytes;      // of an element
  bool out_half;      // fp16, not bf16
  bool add;           // fp32: to what is there
};

// Rows of codes in a box of the tensor maps, which are 128 codes wide.
inline constexpr int kBoxRowsA = 64;
inline constexpr int kBoxRowsB = 128;

void launch_rows(const GroupedPlan& plan, const Params& params, cudaStream_t stream);
void launch_blocks(const GroupedPlan& plan, const Params& params, cudaStream_t stream);
void launch_columns(const GroupedPlan& plan, const Params& params, cudaStream_t stream);

}  // namespace fp8::core::grouped
