#include "grouped/operands.h"

#include <ATen/ATen.h>

#include "common/tensors.h"
#include "linear/memory.h"
#include "quantize/quantize.h"

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

// Of stored [groups, rows, cols]: codes along cols, scales per row.
Operand quantize_stored_rows(const at::Tensor& stored, bool power_of_two) {
  const int64_t groups = stored.size(0);
  const int64_t rows = stored.size(1);
  const int64_t cols = stored.size(2);
  const QuantizedMatrix q =
      quantize_matrix(stored.view({groups * rows, cols}),
                      {.granularity = core::Granularity::kRowwise, .power_of_two = power_of_two});
  return {q.data.view({groups, rows, cols}), q.scale.view({groups, rows})};
}

// Codes along rows, scales per column, turned: [groups, cols, rows].
Operand quantize_stored_columns(const at::Tensor& stored, bool power_of_two) {
  const int64_t groups = stored.size(0);
  const int64_t rows = stored.size(1);
  const int64_t cols = stored.size(2);
  Operand out{empty_on(stored, {groups, cols, rows}, at::kFloat8_e4m3fn),
              empty_on(stored, {groups, cols}, at::kFloat)};
  const at::Tensor amax = empty_on(stored, {groups, cols}, at::kInt);
  const core::GroupColumnsArgs args{.x = stored.const_data_ptr(),
                                    .x_dtype = to_core(stored.scalar_type()),
                                    .cols = cols,
                                    .ld = cols,
                                    .groups = groups,
                                    .group_rows = rows,
                                    .data_t = out.data.mutable_data_ptr(),
                                    .ld_t = rows,
                                    .scale_t = out.scale.mutable_data_ptr<float>(),
                                    .amax = static_cast<uint32_t*>(amax.mutable_data_ptr()),
                                    .power_of_two = power_of_two};
  FP8_RUN_PASS(quantize_group_columns, stored, args);
  return out;
}

enum Form : uint8_t { kRows = 0, kColumns = 1 };

Operand quantize_weight(const at::Tensor& weight, bool fprop, bool power_of_two) {
  const bool transposed = is_stored_transposed(weight);
  const at::Tensor stored = transposed ? weight.transpose(1, 2) : weight.contiguous();
  const Form form = fprop == transposed ? kColumns : kRows;
  const auto made = memory::remember_weight(weight, stored, form, power_of_two, [&] {
    const Operand q = form == kRows ? quantize_stored_rows(stored, power_of_two)
                                    : quantize_stored_columns(stored, power_of_two);
    return std::pair(q.data, q.scale);
  });
  return {made.first, made.second};
}

}  // namespace

Operand quantize_rows(const at::Tensor& x, bool power_of_two, const at::Tensor& place,
                      int64_t copies) {
  const int64_t rows = x.size(0) * copies;
  Operand out{empty_on(x, {rows, x.size(1)}, at::kFloat8_e4m3fn), empty_on(x, {rows}, at::kFloat)};
  core::ScatterRowsArgs args = scatter_args(x, place, copies);
  args.data = out.data.mutable_data_ptr();
  args.scale = out.scale.mutable_data_ptr<float>();
  args.power_of_two = power_of_two;
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

Operand quantize_columns(const at::Tensor& x, const Tiles& tiles, bool power_of_two,
                         const at::Tensor& source, int64_t copies) {
  const int64_t groups = tiles.padded_offsets.size(0);
  const int64_t cols = x.size(1);
  Operand out{empty_on(x, {cols, tiles.columns}, at::kFloat8_e4m3fn),
              empty_on(x, {groups, cols}, at::kFloat)};
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
      .data_t = out.data.mutable_data_ptr(),
      .ld_t = tiles.columns,
      .scale_t = out.scale.mutable_data_ptr<float>(),
      .amax = static_cast<uint32_t*>(amax.mutable_data_ptr()),
      .power_of_two = power_of_two};
  FP8_RUN_PASS(quantize_group_columns, x, args);
  return out;
}

bool is_stored_transposed(const at::Tensor& weight) {
  return !weight.is_contiguous() && weight.transpose(1, 2).is_contiguous();
}

Operand weight_for_fprop(const at::Tensor& weight, bool power_of_two) {
  return quantize_weight(weight, true, power_of_two);
}
Operand weight_for_dgrad(const at::Tensor& weight, bool power_of_two) {
  return quantize_weight(weight, false, power_of_two);
}

}  // namespace fp8::grouped
