#include "torch/grouped/operands.h"

#include <ATen/ATen.h>

#include "torch/common/tensors.h"
#include "torch/quantize/memory.h"

namespace fp8::grouped {
namespace {

// Elements between rows of a matrix whose columns are contiguous.
core::ScatterRowsArgs scatter_args(const at::Tensor& x, const at::Tensor& place, int64_t copies) {
  return {.x = x.const_data_ptr(),
          .x_dtype = to_core(x.scalar_type()),
          .rows = x.size(0),
          .cols = x.size(1),
          .ld = leading_dim(x),
          .copies = copies,
          .place = place.defined() ? place.const_data_ptr<int32_t>() : nullptr};
}

}  // namespace

Side rows_side(const at::Tensor& like, int64_t rows, int64_t k, const Recipe& recipe) {
  return {.codes = empty_on(like, {rows, k}, at::kFloat8_e4m3fn),
          .scales = empty_on(like, scale_sizes(recipe.granularity, rows, k), at::kFloat),
          .granularity = recipe.granularity,
          .rows = rows};
}

Side quantize_rows(const at::Tensor& x, const Recipe& recipe, const at::Tensor& place,
                   int64_t copies) {
  const Side out = rows_side(x, x.size(0) * copies, x.size(1), recipe);
  core::ScatterRowsArgs args = scatter_args(x, place, copies);
  args.data = out.codes.mutable_data_ptr();
  args.scale = out.scales.mutable_data_ptr<float>();
  args.granularity = recipe.granularity;
  args.power_of_two = recipe.power_of_two;
  FP8_RUN_PASS(scatter_rows, x, args);
  return out;
}

at::Tensor copy_rows(const at::Tensor& x, const at::Tensor& place, int64_t copies) {
  at::Tensor out = empty_on(x, {x.size(0) * copies, x.size(1)}, x.scalar_type());
  core::ScatterRowsArgs args = scatter_args(x, place, copies);
  args.plain = out.mutable_data_ptr();
  FP8_RUN_PASS(scatter_rows, x, args);
  return out;
}

Tiles make_tiles(const at::Tensor& offsets, int64_t rows) {
  const int64_t groups = offsets.size(0);
  Tiles tiles{empty_on(offsets, {core::max_group_tiles(rows, groups), 4}, at::kInt),
              empty_on(offsets, {groups}, at::kInt), core::max_padded_rows(rows, groups)};
  const core::TileTableArgs args{
      .offsets = offsets.const_data_ptr<int32_t>(),
      .groups = groups,
      .rows = rows,
      .tiles = static_cast<core::GroupTile*>(tiles.table.mutable_data_ptr()),
      .padded_offsets = tiles.padded_offsets.mutable_data_ptr<int32_t>()};
  FP8_RUN_PASS(make_tile_table, offsets, args);
  return tiles;
}

Side quantize_columns(const at::Tensor& x, const Tiles& tiles, bool power_of_two,
                      const at::Tensor& source, int64_t copies) {
  const int64_t groups = tiles.padded_offsets.size(0);
  const int64_t cols = x.size(1);
  const Side out{.codes = empty_on(x, {cols, tiles.columns}, at::kFloat8_e4m3fn),
                 .scales = empty_on(x, {groups, cols}, at::kFloat),
                 .granularity = core::Granularity::kRowwise,
                 .rows = cols};
  const at::Tensor amax = empty_on(x, {groups, cols}, at::kInt);
  const core::GroupColumnsArgs args{
      .x = x.const_data_ptr(),
      .x_dtype = to_core(x.scalar_type()),
      .cols = cols,
      .ld = leading_dim(x),
      .groups = groups,
      .tiles = static_cast<const core::GroupTile*>(tiles.table.const_data_ptr()),
      .tile_count = tiles.table.size(0),
      .source = source.defined() ? source.const_data_ptr<int32_t>() : nullptr,
      .copies = copies,
      .data_t = out.codes.mutable_data_ptr(),
      .ld_t = tiles.columns,
      .scale_t = out.scales.mutable_data_ptr<float>(),
      .amax = static_cast<uint32_t*>(amax.mutable_data_ptr()),
      .power_of_two = power_of_two};
  FP8_RUN_PASS(quantize_group_columns, x, args);
  return out;
}

WeightForFprop weight_for_fprop(const at::Tensor& weight, const Recipe& recipe, bool keep_amax) {
  const Operand made = operand::remembered_weight(weight, {.granularity = recipe.weight_granularity,
                                                           .power_of_two = recipe.power_of_two,
                                                           .keep_amax = keep_amax});
  return {made.along_cols, keep_amax ? made.amax : at::Tensor()};
}

Side weight_for_dgrad(const at::Tensor& weight, const Recipe& recipe,
                      const std::optional<at::Tensor>& amax) {
  return operand::remembered_weight(
             weight, {.granularity = recipe.weight_granularity,
                      .along_cols = false,
                      .along_rows = true,
                      .power_of_two = recipe.power_of_two,
                      .scaling = amax ? Scaling::known_amax(amax->contiguous(), /*delayed=*/false)
                                      : Scaling::dynamic()})
      .along_rows;
}

bool keeps_amax(const at::Tensor& weight, const Recipe& recipe) {
  return recipe.weight_granularity == core::Granularity::kRowwise && operand::keeps_amax(weight);
}

at::Tensor kept_amax_like(const at::Tensor& weight, const Recipe& recipe) {
  if (!keeps_amax(weight, recipe)) return none_like(weight);
  return at::empty_symint({weight.sym_size(0), pad16(weight.sym_size(2))},
                          weight.options().dtype(at::kFloat));
}

}  // namespace fp8::grouped
