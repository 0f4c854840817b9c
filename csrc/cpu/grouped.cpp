#include "cpu/grouped.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/grouped_rows.h"
#include "cpu/kernels.h"

namespace fp8::cpu {
namespace {

// Where group g's rows begin and end; offsets that make no sense give empty groups.
struct Range {
  int64_t begin;
  int64_t end;
};
Range range_of(const int32_t* offsets, int64_t group, int64_t rows) {
  const int64_t begin = group == 0 ? 0 : std::clamp<int64_t>(offsets[group - 1], 0, rows);
  return {begin, std::max(begin, std::min<int64_t>(offsets[group], rows))};
}

}  // namespace

void route(const core::RouteArgs& a) {
  std::vector<int32_t> count(a.groups + 1, 0);
  const auto bucket_of = [&](int64_t slot) {
    const int64_t expert = a.experts[slot];
    return expert >= 0 && expert < a.groups ? expert : a.groups;
  };
  for (int64_t slot = 0; slot < a.slots; ++slot) ++count[bucket_of(slot)];
  int32_t before = 0;
  for (int64_t g = 0; g <= a.groups; ++g) {
    const int32_t begin = before;
    before += count[g];
    count[g] = begin;
    if (g < a.groups) a.offsets[g] = before;
  }
  for (int64_t slot = 0; slot < a.slots; ++slot) {
    const int32_t row = count[bucket_of(slot)]++;
    a.place[slot] = row;
    a.source[row] = static_cast<int32_t>(slot);
  }
}

void scatter_rows(const core::ScatterRowsArgs& a) {
  const int64_t bytes = dtype_bytes(a.x_dtype);
  at::parallel_for(0, a.rows, grain(a.cols * a.copies), [&](int64_t begin, int64_t end) {
    const int64_t block = scaled_together(a.granularity, a.cols);
    std::vector<float> row(a.cols);
    std::vector<uint8_t> codes(a.cols);
    std::vector<float> scales((a.cols + block - 1) / block);
    for (int64_t r = begin; r < end; ++r) {
      const char* source = static_cast<const char*>(a.x) + r * a.ld * bytes;
      if (a.data != nullptr) {
        widen(source, a.x_dtype, a.cols, row.data());
        quantize_blocks(row.data(), a.cols, block, codes.data(), scales.data(), 1,
                        {a.dtype, a.power_of_two});
      }
      for (int64_t copy = 0; copy < a.copies; ++copy) {
        const int64_t to = a.place != nullptr ? a.place[r * a.copies + copy] : r;
        if (a.data != nullptr) {
          std::memcpy(static_cast<uint8_t*>(a.data) + to * a.cols, codes.data(), a.cols);
          for (size_t b = 0; b < scales.size(); ++b)
            a.scale[b * a.rows * a.copies + to] = scales[b];
        }
        if (a.plain != nullptr) {
          std::memcpy(static_cast<char*>(a.plain) + to * a.cols * bytes, source, a.cols * bytes);
        }
      }
    }
  });
}

void make_tile_table(const core::TileTableArgs& a) {
  const int64_t entries = core::max_group_tiles(a.rows, a.groups);
  std::fill_n(a.tiles, entries, core::GroupTile{});
  int64_t tile = 0;
  int64_t column = 0;
  for (int64_t g = 0; g < a.groups; ++g) {
    const auto [begin, end] = range_of(a.offsets, g, a.rows);
    const int64_t padded = core::padded_group(end - begin);
    for (int64_t done = 0; done < padded; done += core::kGroupTileRows) {
      const int64_t rows = std::min(end - begin - done, core::kGroupTileRows);
      const int64_t columns = std::min(padded - done, core::kGroupTileRows);
      a.tiles[tile++] = {static_cast<int32_t>(begin + done),
                         static_cast<int32_t>(rows | columns << 8 | (done == 0 ? 1 << 16 : 0)),
                         static_cast<int32_t>(column + done), static_cast<int32_t>(g)};
    }
    column += padded;
    a.padded_offsets[g] = static_cast<int32_t>(column);
  }
  const int64_t columns = core::max_padded_rows(a.rows, a.groups);
  for (; column < columns; column += core::kGroupTileRows) {
    const int64_t left = std::min(columns - column, core::kGroupTileRows);
    a.tiles[tile++] = {0, static_cast<int32_t>(left << 8), static_cast<int32_t>(column), 0};
  }
}

namespace {

// A group in a transposed copy.
struct Columns {
  int64_t row = 0;
  int64_t rows = 0;
  int64_t padded = 0;
  int64_t place = 0;  // of its first column's first code in data_t
};

std::vector<Columns> column_groups(const core::GroupColumnsArgs& a) {
  std::vector<Columns> groups(a.groups);
  if (a.tiles == nullptr) {
    for (int64_t g = 0; g < a.groups; ++g) {
      groups[g] = {g * a.group_rows, a.group_rows, a.ld_t, g * a.cols * a.ld_t};
    }
    return groups;
  }
  for (int64_t t = 0; t < a.tile_count; ++t) {
    const core::GroupTile& tile = a.tiles[t];
    if (tile.group < 0) continue;
    if (tile.extents >> 8 < 256 && (tile.extents & 0xFF) == 0) {  // fills what is left
      for (int64_t c = 0; c < a.cols; ++c) {
        std::memset(static_cast<uint8_t*>(a.data_t) + c * a.ld_t + tile.column, 0,
                    tile.extents >> 8);
      }
      continue;
    }
    Columns& group = groups[tile.group];
    if ((tile.extents >> 16 & 1) != 0) {
      group.row = tile.row;
      group.place = tile.column;
    }
    group.rows += tile.extents & 0xFF;
    group.padded += tile.extents >> 8 & 0xFF;
  }
  return groups;
}

}  // namespace

void quantize_group_columns(const core::GroupColumnsArgs& a) {
  const std::vector<Columns> groups = column_groups(a);
  const CodeFormat format{a.dtype, a.power_of_two};
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (a.cols + kBlock - 1) / kBlock;
  at::parallel_for(0, a.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> values;
    std::vector<uint8_t> codes(kBlock);
    for (int64_t item = begin; item < end; ++item) {
      const Columns& group = groups[item / blocks];
      const int64_t col0 = item % blocks * kBlock;
      const int64_t cols = std::min(a.cols - col0, kBlock);
      std::vector<uint32_t> bits(cols, 0U);
      if (a.amax_is_known) std::copy_n(a.amax + item / blocks * a.cols + col0, cols, bits.begin());
      values.resize(group.rows * cols);
      for (int64_t r = 0; r < group.rows; ++r) {
        const int64_t row =
            a.source != nullptr ? a.source[group.row + r] / a.copies : group.row + r;
        read(a.x, a.x_dtype, row * a.ld + col0, cols, &values[r * cols]);
        if (!a.amax_is_known) amax_update(&values[r * cols], cols, bits.data());
      }
      std::vector<float> multipliers(cols);
      for (int64_t c = 0; c < cols; ++c) {
        multipliers[c] = format.multiplier(std::bit_cast<float>(bits[c]));
        a.scale_t[item / blocks * a.cols + col0 + c] = 1.0F / multipliers[c];
      }
      auto* out = static_cast<uint8_t*>(a.data_t) + group.place + col0 * a.ld_t;
      for (int64_t c = 0; c < cols; ++c) std::memset(out + c * a.ld_t, 0, group.padded);
      for (int64_t r = 0; r < group.rows; ++r) {
        encode_columns(&values[r * cols], multipliers.data(), a.dtype, cols, codes.data());
        for (int64_t c = 0; c < cols; ++c) out[c * a.ld_t + r] = codes[c];
      }
    }
  });
}

void quantize_stack_squares(const core::StackSquaresArgs& a) {
  const int64_t elements = a.rows * a.cols;
  for (int64_t g = 0; g < a.groups; ++g) {
    core::QuantizeArgs matrix{
        .x = static_cast<const char*>(a.x) + g * elements * dtype_bytes(a.x_dtype),
        .x_dtype = a.x_dtype,
        .rows = a.rows,
        .cols = a.cols,
        .ld = a.cols,
        .dtype = a.dtype,
        .granularity = core::Granularity::kBlock128x128,
        .power_of_two = a.power_of_two};
    const auto part = [&](void* data, float* scale, int64_t rows, int64_t cols) {
      const int64_t scales = core::blocks_of(rows) * core::square_scale_ld(cols);
      return std::pair(core::Destination{static_cast<uint8_t*>(data) + g * elements, rows, cols},
                       scale + g * scales);
    };
    if (a.data != nullptr) {
      std::tie(matrix.data, matrix.scale) = part(a.data, a.scale, a.rows, a.cols);
    }
    if (a.data_t != nullptr) {
      std::tie(matrix.data_t, matrix.scale_t) = part(a.data_t, a.scale_t, a.cols, a.rows);
    }
    quantize(matrix);
  }
}

void combine(const core::CombineArgs& a) {
  const int64_t rows = grouped_rows(a.offsets, a.groups, a.tokens * a.top_k);
  at::parallel_for(0, a.tokens, grain(a.cols * a.top_k), [&](int64_t begin, int64_t end) {
    std::vector<float> row(a.cols);
    std::vector<float> bias(a.cols, 0.0F);
    std::vector<float> sum(a.cols);
    for (int64_t token = begin; token < end; ++token) {
      std::fill(sum.begin(), sum.end(), 0.0F);
      for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
        if (a.place[slot] >= rows) continue;
        const float weight = a.weights != nullptr ? a.weights[slot] : 1.0F;
        read(a.x, a.dtype, a.place[slot] * a.cols, a.cols, row.data());
        if (a.bias != nullptr) read(a.bias, a.dtype, a.experts[slot] * a.cols, a.cols, bias.data());
        for (int64_t c = 0; c < a.cols; ++c) sum[c] += weight * (row[c] + bias[c]);
      }
      write(a.out, a.dtype, token * a.cols, a.cols, sum.data());
    }
  });
}

void finish_rows(const core::FinishRowsArgs& a) {
  const int64_t grouped = grouped_rows(a.offsets, a.groups, a.rows);
  const int64_t first = a.bias != nullptr ? 0 : grouped;
  at::parallel_for(first, a.rows, grain(a.cols), [&](int64_t begin, int64_t end) {
    std::vector<float> row(a.cols);
    std::vector<float> bias(a.cols);
    for (int64_t r = begin; r < end; ++r) {
      if (r >= grouped) {
        std::fill(row.begin(), row.end(), 0.0F);
      } else {
        read(a.x, a.dtype, r * a.ld, a.cols, row.data());
        read(a.bias, a.dtype, group_of(a.offsets, a.groups, r) * a.cols, a.cols, bias.data());
        for (int64_t c = 0; c < a.cols; ++c) row[c] += bias[c];
      }
      write(a.x, a.dtype, r * a.ld, a.cols, row.data());
    }
  });
}

void group_sums(const core::GroupSumsArgs& a) {
  at::parallel_for(0, a.groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(a.cols);
    std::vector<float> sum(a.cols);
    for (int64_t g = begin; g < end; ++g) {
      const auto [first, last] = range_of(a.offsets, g, INT32_MAX);
      std::fill(sum.begin(), sum.end(), 0.0F);
      for (int64_t r = first; r < last; ++r) {
        const int64_t slot = a.source != nullptr ? a.source[r] : r;
        const float weight = a.weights != nullptr ? a.weights[slot] : 1.0F;
        read(a.x, a.dtype, (a.source != nullptr ? slot / a.copies : r) * a.ld, a.cols, row.data());
        for (int64_t c = 0; c < a.cols; ++c) sum[c] += weight * row[c];
      }
      write(a.out, a.dtype, g * a.cols, a.cols, sum.data());
    }
  });
}

}  // namespace fp8::cpu
