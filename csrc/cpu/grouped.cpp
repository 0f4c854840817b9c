#include "cpu/grouped.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/formats.h"
#include "cpu/loops.h"

namespace fp8::cpu {
namespace {

using core::Dtype;

int64_t grain(int64_t row_elements) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_elements));
}

// Elements of a tensor of any high-precision dtype as floats.
void read(const void* x, Dtype dtype, int64_t offset, int64_t count, float* out) {
  widen(static_cast<const char*>(x) + offset * dtype_bytes(dtype), dtype, count, out);
}

void write(void* x, Dtype dtype, int64_t offset, int64_t count, const float* values) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == Dtype::kFloat32) {
      static_cast<float*>(x)[offset + i] = values[i];
    } else if (dtype == Dtype::kBFloat16) {
      static_cast<c10::BFloat16*>(x)[offset + i] = c10::BFloat16(values[i]);
    } else {
      static_cast<c10::Half*>(x)[offset + i] = c10::Half(values[i]);
    }
  }
}

float rounded(float value, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return static_cast<float>(c10::BFloat16(value));
  if (dtype == Dtype::kFloat16) return static_cast<float>(c10::Half(value));
  return value;
}

// Codes of a row, and its scale.
float quantize_row(const float* row, int64_t cols, void* data, int64_t offset) {
  const float multiplier = quant_multiplier(std::bit_cast<float>(amax_bits(row, cols)), E4M3::kMax);
  encode(row, multiplier, Dtype::kE4M3, cols, static_cast<uint8_t*>(data) + offset);
  return 1.0F / multiplier;
}

// Where group g's rows begin and end; offsets that make no sense give empty groups.
struct Range {
  int64_t begin;
  int64_t end;
};
Range range_of(const int32_t* offsets, int64_t group, int64_t rows) {
  const int64_t begin = group == 0 ? 0 : std::clamp<int64_t>(offsets[group - 1], 0, rows);
  return {begin, std::max(begin, std::min<int64_t>(offsets[group], rows))};
}

int64_t grouped_rows(const int32_t* offsets, int64_t groups, int64_t rows) {
  return groups == 0 ? 0 : std::min<int64_t>(offsets[groups - 1], rows);
}

int64_t group_of(const int32_t* offsets, int64_t groups, int64_t row) {
  return std::upper_bound(offsets, offsets + groups - 1, row) - offsets;
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
    std::vector<float> row(a.cols);
    std::vector<uint8_t> codes(a.cols);
    for (int64_t r = begin; r < end; ++r) {
      const char* source = static_cast<const char*>(a.x) + r * a.ld * bytes;
      float scale = 1.0F;
      if (a.data != nullptr) {
        widen(source, a.x_dtype, a.cols, row.data());
        scale = quantize_row(row.data(), a.cols, codes.data(), 0);
      }
      for (int64_t copy = 0; copy < a.copies; ++copy) {
        const int64_t to = a.place != nullptr ? a.place[r * a.copies + copy] : r;
        if (a.data != nullptr) {
          std::memcpy(static_cast<uint8_t*>(a.data) + to * a.cols, codes.data(), a.cols);
          a.scale[to] = scale;
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
    const int64_t padded = std::max<int64_t>((end - begin + 15) / 16 * 16, 16);
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
      values.resize(group.rows * cols);
      for (int64_t r = 0; r < group.rows; ++r) {
        const int64_t row =
            a.source != nullptr ? a.source[group.row + r] / a.copies : group.row + r;
        read(a.x, a.x_dtype, row * a.ld + col0, cols, &values[r * cols]);
        amax_update(&values[r * cols], cols, bits.data());
      }
      std::vector<float> multipliers(cols);
      for (int64_t c = 0; c < cols; ++c) {
        multipliers[c] = quant_multiplier(std::bit_cast<float>(bits[c]), E4M3::kMax);
        a.scale_t[item / blocks * a.cols + col0 + c] = 1.0F / multipliers[c];
      }
      auto* out = static_cast<uint8_t*>(a.data_t) + group.place + col0 * a.ld_t;
      for (int64_t c = 0; c < cols; ++c) std::memset(out + c * a.ld_t, 0, group.padded);
      for (int64_t r = 0; r < group.rows; ++r) {
        encode_columns(&values[r * cols], multipliers.data(), Dtype::kE4M3, cols, codes.data());
        for (int64_t c = 0; c < cols; ++c) out[c * a.ld_t + r] = codes[c];
      }
    }
  });
}

namespace {

// Value and derivatives of one gated unit, as grouped/gate.cu has them.
struct Unit {
  float h;
  float d_gate;
  float d_up;
};

float sigmoid(float x) { return 1.0F / (1.0F + std::exp(-x)); }

Unit gated_unit(const core::GateArgs& a, float gate, float up) {
  float act = 0.0F;
  float d_act = 0.0F;
  float factor = up;
  float d_factor = 1.0F;
  switch (a.activation) {
    case core::Activation::kSilu: {
      const float s = sigmoid(gate);
      act = gate * s;
      d_act = s * (1.0F + gate * (1.0F - s));
      break;
    }
    case core::Activation::kGelu: {
      const float cdf = 0.5F * (1.0F + std::erf(gate * 0.70710678F));
      act = gate * cdf;
      d_act = cdf + gate * 0.39894228F * std::exp(-0.5F * gate * gate);
      break;
    }
    case core::Activation::kGeluTanh: {
      const float inner = 0.79788456F * (gate + 0.044715F * gate * gate * gate);
      const float t = std::tanh(inner);
      act = 0.5F * gate * (1.0F + t);
      d_act = 0.5F * (1.0F + t) +
              0.5F * gate * (1.0F - t * t) * 0.79788456F * (1.0F + 3.0F * 0.044715F * gate * gate);
      break;
    }
    case core::Activation::kClampedSilu: {
      const bool passes = !(gate > a.limit);
      const float clamped = passes ? gate : a.limit;
      const float s = sigmoid(a.alpha * clamped);
      act = clamped * s;
      if (passes) d_act = s * (1.0F + a.alpha * clamped * (1.0F - s));
      const bool inside = !(up > a.limit) && !(up < -a.limit);
      factor = (inside ? up : up > 0.0F ? a.limit : -a.limit) + 1.0F;
      d_factor = inside ? 1.0F : 0.0F;
      break;
    }
  }
  return {act * factor, d_act * factor, act * d_factor};
}

// Rows of gates and ups, with their bias; gate(i) and up(i) know the layout.
struct GateRow {
  const core::GateArgs& a;
  std::vector<float> values = std::vector<float>(2 * a.features);
  std::vector<float> bias = std::vector<float>(a.bias != nullptr ? 2 * a.features : 0);

  void load(int64_t row) {
    read(a.gate_up, a.dtype, row * 2 * a.features, 2 * a.features, values.data());
    if (a.bias == nullptr) return;
    const int64_t group = group_of(a.offsets, a.groups, row);
    read(a.bias, a.dtype, group * 2 * a.features, 2 * a.features, bias.data());
    for (int64_t i = 0; i < 2 * a.features; ++i) values[i] += bias[i];
  }
  int64_t gate_at(int64_t i) const { return a.interleaved ? 2 * i : i; }
  int64_t up_at(int64_t i) const { return a.interleaved ? 2 * i + 1 : a.features + i; }
  Unit unit(int64_t i) const { return gated_unit(a, values[gate_at(i)], values[up_at(i)]); }
};

}  // namespace

void gate_forward(const core::GateForwardArgs& args) {
  const core::GateArgs& a = args.gate;
  const int64_t rows = grouped_rows(a.offsets, a.groups, a.rows);
  at::parallel_for(0, rows, grain(2 * a.features), [&](int64_t begin, int64_t end) {
    GateRow row{a};
    std::vector<float> h(a.features);
    for (int64_t r = begin; r < end; ++r) {
      row.load(r);
      for (int64_t i = 0; i < a.features; ++i) h[i] = rounded(row.unit(i).h, a.dtype);
      args.scale[r] = quantize_row(h.data(), a.features, args.data, r * a.features);
    }
  });
}

void gate_backward(const core::GateBackwardArgs& args) {
  const core::GateArgs& a = args.gate;
  const int64_t rows = grouped_rows(a.offsets, a.groups, a.rows);
  at::parallel_for(0, rows, grain(2 * a.features), [&](int64_t begin, int64_t end) {
    GateRow row{a};
    std::vector<float> dh(a.features);
    std::vector<float> weighted(a.features);
    std::vector<float> d(2 * a.features);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t slot = args.source[r];
      const float weight = args.weights[slot];
      row.load(r);
      read(args.dh, a.dtype, r * a.features, a.features, dh.data());
      float dot = 0.0F;
      for (int64_t i = 0; i < a.features; ++i) {
        const Unit unit = row.unit(i);
        const float h = rounded(unit.h, a.dtype);
        d[row.gate_at(i)] = rounded(weight * dh[i] * unit.d_gate, a.dtype);
        d[row.up_at(i)] = rounded(weight * dh[i] * unit.d_up, a.dtype);
        dot += dh[i] * h;
        weighted[i] = weight * h;
      }
      if (args.d_weights != nullptr) args.d_weights[slot] = dot;
      const int64_t place = r * 2 * a.features;
      if (args.data != nullptr) {
        args.scale[r] = quantize_row(d.data(), 2 * a.features, args.data, place);
      }
      if (args.d_gate_up != nullptr) {
        write(args.d_gate_up, a.dtype, place, 2 * a.features, d.data());
      }
      if (args.weighted_h != nullptr) {
        write(args.weighted_h, a.dtype, r * a.features, a.features, weighted.data());
      }
    }
  });
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
