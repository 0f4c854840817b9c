// What the quantize kernels take, and their launchers. Internal to fp8_core; the entry is
// core::quantize.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "fp8/core.h"
#include "host/launch.h"

namespace fp8::core {

// pdl, in all of them: a programmatic dependent launch (dispatch.cuh).

// The cast pass begins where the first pass ended: part of x is still in L2 there. Tensorwise with
// a transposed copy it goes from the last rows up, else from the first rows down: 1 to 4% faster
// than the other way round on an H100 (67 MB).

// First pass: partial results of each block, in fixed places, so that nothing is zeroed and nothing
// is atomic. amax as the bits of a non-negative float.
struct StatisticsParams {
  const void* x;    // [rows, cols]
  bool vectorized;  // rows start on 16-byte boundaries
  bool pdl;
  bool from_below;  // begins at the last rows
  StatisticsPlan plan;
  uint32_t* tensor_amax;  // [row_chunks * col_tiles], or nullptr
  uint32_t* row_amax;     // [row_parts, rows], or nullptr
  uint32_t* col_amax;     // [col_parts, cols], or nullptr
  float* col_sum;         // [col_parts, cols], or nullptr
};
void launch_statistics(const StatisticsParams& params, Dtype x_dtype, cudaStream_t stream);

// Second pass: reduces the partial results of its rows and columns, casts, transposes.
struct CastParams {
  const void* x;  // [rows, cols]
  int64_t rows;
  int64_t cols;
  int64_t ld;
  bool vectorized;
  bool pdl;  // the first pass, as a rule
  CastPlan plan;
  Destination data;
  Destination data_t;
  bool power_of_two;  // of scales that are computed
  float* scale;
  float* scale_t;
  // tensorwise: static_scale or tensor_amax, or else the scale is delayed and history gives it
  const float* static_scale;
  const uint32_t* tensor_amax;  // [tensor_parts]
  int tensor_parts;
  float* amax_out;
  uint32_t* history;         // [kAmaxHistorySize], or nullptr
  uint2* tile_report;        // delayed: [tiles], amax of the finite values and fingerprint
  uint32_t* tile_guess;      // delayed: [tiles], the amax, as bits, that a tile was cast with
  uint32_t* history_before;  // delayed: [kAmaxHistorySize], a copy from the cast pass
  const uint32_t* row_amax;  // rowwise: [row_parts, rows] where data is made
  int row_parts;
  const uint32_t* col_amax;  // rowwise: [col_parts, cols] where data_t is made
  int col_parts;
  const float* col_sum;  // [col_parts, cols], or nullptr
  void* column_sum;      // [cols]
  Dtype column_sum_dtype;
};
void launch_cast(const CastParams& params, Dtype x_dtype, Dtype dtype, Granularity granularity,
                 cudaStream_t stream);

// What follows a delayed cast: finds the scale, moves the history on, and casts tiles again that
// were cast with another one. `blocks` share the tiles.
void launch_settle_delayed(const CastParams& params, unsigned blocks, Dtype x_dtype, Dtype dtype,
                           cudaStream_t stream);

// Both passes in one cooperative launch. `cast` is without column sums; where it asks for maxima,
// those are the ones that this launch leaves below.
struct CooperativeParams {
  CastParams cast;
  CooperativePlan plan;
  uint32_t* tensor_amax;  // tensorwise: [plan.blocks]
  // rowwise
  uint32_t* row_amax;     // [plan.col_tiles, rows of whole tiles], where data is made
  float* row_multiplier;  // [rows of whole tiles], the same
  uint32_t* col_amax;     // [blocks of a column of tiles, cols]
};
// False, and nothing launched, where the device cannot hold plan.blocks blocks at a time.
bool launch_cooperative_cast(const CooperativeParams& params, Dtype x_dtype, Dtype dtype,
                             int device, cudaStream_t stream);
// The same for a scale for each row and column; makes data_t, with or without data.
bool launch_cooperative_rowwise(const CooperativeParams& params, Dtype x_dtype, Dtype dtype,
                                int device, cudaStream_t stream);

// One pass: a row is read into registers, its amax taken, and cast.
struct RowwiseParams {
  const void* x;
  int64_t rows;
  int64_t cols;
  int64_t ld;
  bool vectorized;
  bool pdl;
  RowwisePlan plan;
  Destination data;
  bool power_of_two;
  float* scale;  // [data.rows]
};
void launch_rowwise(const RowwiseParams& params, Dtype x_dtype, Dtype dtype, cudaStream_t stream);
// The same of groups of rows, with the maxima of each group's columns. No padding.
void launch_rowwise_column_amax(const RowwiseParams& params, const ColumnAmaxPlan& plan,
                                int64_t group_rows,
                                uint32_t* column_amax,  // [rows / group_rows, cols]
                                Dtype x_dtype, Dtype dtype, cudaStream_t stream);

// One pass: a tile of 128 x 128 is read into registers, which has its groups' amaxes in it.
struct BlockwiseParams {
  const void* x;
  int64_t rows;
  int64_t cols;
  int64_t ld;
  bool vectorized;
  bool pdl;
  BlockwisePlan plan;
  Destination data;
  Destination data_t;
  bool power_of_two;
  float* scale;    // layouts: Granularity
  float* scale_t;  // the same
  float* col_sum;  // [blocks_of(rows), cols], or nullptr: sums of each tile's columns
};
void launch_blockwise(const BlockwiseParams& params, Dtype x_dtype, Dtype dtype,
                      Granularity granularity, cudaStream_t stream);

// The launchers above, for elements from anywhere: core::quantize has those of a matrix in memory,
// a producer (core/mlp) its own. Parameters that say where x lies mean nothing to the latter.
class QuantizePasses {
 public:
  virtual ~QuantizePasses() = default;
  virtual void statistics(const StatisticsParams& params, cudaStream_t stream) const = 0;
  virtual void cast(const CastParams& params, Dtype dtype, Granularity granularity,
                    cudaStream_t stream) const = 0;
  virtual void settle_delayed(const CastParams& params, unsigned blocks, Dtype dtype,
                              cudaStream_t stream) const = 0;
  virtual void rowwise(const RowwiseParams& params, Dtype dtype, cudaStream_t stream) const = 0;
  virtual void blockwise(const BlockwiseParams& params, Dtype dtype, Granularity granularity,
                         cudaStream_t stream) const = 0;
};

// core::quantize with these launchers. Of args, x, ld and x_dtype mean nothing to a producer; ld is
// -1 there, which keeps the matrix from being folded, and whole_gpu false.
void quantize_with(const QuantizePasses& passes, const QuantizeArgs& args, Stream stream);

// Adds up what launch_blockwise left in col_sum.
struct ColumnSumParams {
  const float* col_sum;  // [parts, cols]
  int64_t parts;
  int64_t cols;
  void* column_sum;  // [cols]
  Dtype column_sum_dtype;
  bool pdl;
};
void launch_column_sum(const ColumnSumParams& params, cudaStream_t stream);

}  // namespace fp8::core
