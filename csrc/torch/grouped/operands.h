// FP8 sides of grouped matmuls, and the passes between them, on tensors: allocates what
// core_grouped.h's passes write, and runs them on the tensors' device.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/grouped.h"
#include "fp8/core_grouped.h"
#include "torch/common/cuda_context.h"
#include "torch/common/recipe.h"
#include "torch/quantize/operand.h"

namespace fp8::grouped {

// Memory for codes [rows, k] and their scales, [rows] or [blocks of k, rows], nothing written.
Side rows_side(const at::Tensor& like, int64_t rows, int64_t k, const Recipe& recipe);

// Each row of x quantized; with `place`, written there `copies` times.
Side quantize_rows(const at::Tensor& x,  // [M, K], contiguous columns
                   const Recipe& recipe, const at::Tensor& place = {},  // [M * copies] int32
                   int64_t copies = 1);

// The rows of x themselves, copied to their places: [M * copies, K].
at::Tensor copy_rows(const at::Tensor& x, const at::Tensor& place, int64_t copies);

// Where the groups of `offsets` lie in transposed copies.
struct Tiles {
  at::Tensor table;           // [max_group_tiles, 4] int32
  at::Tensor padded_offsets;  // [groups] int32
  int64_t columns;            // of a transposed copy
};
Tiles make_tiles(const at::Tensor& offsets, int64_t rows);

// x's columns quantized within each group of rows, rowwise as the product reads them: codes [K,
// tiles.columns], scales [groups, K]. power_of_two: scales are powers of two. With `source`, row r
// of the groups is x's row source[r] / copies.
Side quantize_columns(const at::Tensor& x,  // [rows, K], contiguous columns
                      const Tiles& tiles, bool power_of_two,
                      const at::Tensor& source = {},  // [rows] int32
                      int64_t copies = 1);

// An expert's weight as the product over its in-features reads it (codes [groups, N, K], a scale
// for each out-feature), and as the one over its out-features does ([groups, K, N], a scale for
// each in-feature, which the maxima of columns spare a pass); or both in squares. Made once inside
// fp8.cached_weights.
struct WeightForFprop {
  Side side;
  at::Tensor amax;  // [groups, K] fp32, undefined where not kept
};
WeightForFprop weight_for_fprop(const at::Tensor& weight,  // [groups, N, K], see make_stack
                                const Recipe& recipe,
                                bool keep_amax);  // where keeps_amax
Side weight_for_dgrad(const at::Tensor& weight,   // the same
                      const Recipe& recipe,
                      const std::optional<at::Tensor>& amax = {});  // what fprop kept

// Whether there are maxima to keep; squares need none.
bool keeps_amax(const at::Tensor& weight, const Recipe& recipe);  // [groups, N, K]
// Fake: what a forward keeps of a weight; an empty tensor where it keeps nothing.
at::Tensor kept_amax_like(const at::Tensor& weight, const Recipe& recipe);  // [groups, N, K]

}  // namespace fp8::grouped
