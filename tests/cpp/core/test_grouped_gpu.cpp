// The passes around grouped matmuls without torch, one case each, against plain loops on the host.
// compute-sanitizer's racecheck runs them: no other library's kernel is in this process.
#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "common/formats.h"
#include "device_memory.h"
#include "fp8/core_grouped.h"

using namespace fp8::core;

namespace {

struct Problem {
  int64_t tokens;
  int64_t top_k;
  int64_t groups;
  int64_t cols;
};

Problem problems() {
  // One of each; groups that are empty; more groups than threads of a block; rows as long as a
  // block's registers hold and longer.
  return GENERATE(Problem{1, 1, 1, 16}, Problem{40, 2, 5, 48}, Problem{300, 3, 300, 80},
                  Problem{520, 2, 3, 2064}, Problem{9, 4, 2, 33 * 1024});
}

// Experts of slots, sentinels among them, and where a stable sort puts the slots.
struct Routing {
  std::vector<int64_t> experts;
  std::vector<int32_t> offsets;
  std::vector<int32_t> place;
  std::vector<int32_t> source;

  Routing(int64_t slots, int64_t groups)
      : experts(slots), offsets(groups), place(slots), source(slots) {
    std::mt19937 engine(11);
    for (int64_t& expert : experts) {
      expert = static_cast<int64_t>(engine() % (groups + 2)) - 1;  // -1 and groups: nobody's
    }
    int32_t row = 0;
    for (int64_t g = 0; g <= groups; ++g) {
      for (int64_t slot = 0; slot < slots; ++slot) {
        const bool nobody = experts[slot] < 0 || experts[slot] >= groups;
        if (g == groups ? !nobody : experts[slot] != g) continue;
        place[slot] = row;
        source[row++] = static_cast<int32_t>(slot);
      }
      if (g < groups) offsets[g] = row;
    }
  }
  int64_t rows() const { return offsets.back(); }  // of a group
};

// The group of each of its rows.
std::vector<int64_t> groups_of(const Routing& routing) {
  std::vector<int64_t> group;
  for (int64_t g = 0; g < std::ssize(routing.offsets); ++g) group.resize(routing.offsets[g], g);
  return group;
}

struct Codes {
  float scale;
  float multiplier;
  explicit Codes(const std::vector<float>& values) : scale(0), multiplier(0) {
    float amax = 0.0F;
    for (const float v : values) amax = std::max(amax, std::fabs(v));
    multiplier = fp8::quant_multiplier(amax, 448.0F);
    scale = 1.0F / multiplier;
  }
  uint8_t operator()(float value) const { return fp8::encode<fp8::E4M3>(value * multiplier); }
};

}  // namespace

TEST_CASE("slots are sorted by expert, stably", "[grouped]") {
  const Problem p = problems();
  const int64_t slots = p.tokens * p.top_k;
  const Routing expected(slots, p.groups);
  const Buffer<int64_t> experts(expected.experts);
  Buffer<int32_t> offsets(p.groups);
  Buffer<int32_t> place(slots);
  Buffer<int32_t> source(slots);
  RouteArgs args{.experts = experts.data,
                 .slots = slots,
                 .groups = p.groups,
                 .offsets = offsets.data,
                 .place = place.data,
                 .source = source.data};
  Buffer<int32_t> workspace(route_workspace_words(args));
  args.workspace = workspace.data;
  route(args, nullptr);
  check(cudaDeviceSynchronize());
  REQUIRE(offsets.host() == expected.offsets);
  REQUIRE(place.host() == expected.place);
  REQUIRE(source.host() == expected.source);
}

TEST_CASE("rows are quantized and scattered", "[grouped]") {
  const Problem p = problems();
  const int64_t slots = p.tokens * p.top_k;
  const Routing routing(slots, p.groups);
  const std::vector<float> host = random_matrix(p.tokens * p.cols, 12);
  const Buffer<float> x(host);
  const Buffer<int32_t> place(routing.place);
  Buffer<uint8_t> data(slots * p.cols);
  Buffer<float> scale(slots);
  Buffer<float> plain(slots * p.cols);
  scatter_rows({.x = x.data,
                .x_dtype = Dtype::kFloat32,
                .rows = p.tokens,
                .cols = p.cols,
                .ld = p.cols,
                .copies = p.top_k,
                .place = place.data,
                .data = data.data,
                .scale = scale.data,
                .plain = plain.data},
               nullptr);
  check(cudaDeviceSynchronize());
  const auto codes = data.host();
  const auto scales = scale.host();
  const auto copies = plain.host();
  int64_t wrong = 0;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const auto row = host.begin() + slot / p.top_k * p.cols;
    const Codes expected({row, row + p.cols});
    const int64_t at = routing.place[slot];
    wrong += scales[at] != expected.scale;
    for (int64_t c = 0; c < p.cols; ++c) {
      wrong += codes[at * p.cols + c] != expected(row[c]);
      wrong += copies[at * p.cols + c] != row[c];
    }
  }
  REQUIRE(wrong == 0);
}

TEST_CASE("groups' columns are quantized and turned", "[grouped]") {
  const Problem p = problems();
  const int64_t slots = p.tokens * p.top_k;
  const Routing routing(slots, p.groups);
  const std::vector<float> host = random_matrix(p.tokens * p.cols, 13);
  const Buffer<float> x(host);
  const Buffer<int32_t> offsets(routing.offsets);
  const Buffer<int32_t> source(routing.source);
  const int64_t tile_count = max_group_tiles(slots, p.groups);
  const int64_t ld = max_padded_rows(slots, p.groups);
  Buffer<GroupTile> tiles(tile_count);
  Buffer<int32_t> padded(p.groups);
  Buffer<uint8_t> data(p.cols * ld);
  Buffer<float> scale(p.groups * p.cols);
  Buffer<uint32_t> amax(p.groups * p.cols);
  make_tile_table({.offsets = offsets.data,
                   .groups = p.groups,
                   .rows = slots,
                   .tiles = tiles.data,
                   .padded_offsets = padded.data},
                  nullptr);
  quantize_group_columns({.x = x.data,
                          .x_dtype = Dtype::kFloat32,
                          .cols = p.cols,
                          .ld = p.cols,
                          .groups = p.groups,
                          .tiles = tiles.data,
                          .tile_count = tile_count,
                          .source = source.data,
                          .copies = p.top_k,
                          .data_t = data.data,
                          .ld_t = ld,
                          .scale_t = scale.data,
                          .amax = amax.data},
                         nullptr);
  check(cudaDeviceSynchronize());
  const auto ends = padded.host();
  const auto codes = data.host();
  const auto scales = scale.host();
  int64_t wrong = 0;
  int64_t begin = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t first = g == 0 ? 0 : routing.offsets[g - 1];
    const int64_t rows = routing.offsets[g] - first;
    REQUIRE(ends[g] == begin + std::max<int64_t>(16, (rows + 15) / 16 * 16));
    for (int64_t c = 0; c < p.cols; ++c) {
      std::vector<float> column;
      for (int64_t r = 0; r < rows; ++r) {
        column.push_back(host[routing.source[first + r] / p.top_k * p.cols + c]);
      }
      const Codes expected(column);
      wrong += scales[g * p.cols + c] != expected.scale;
      for (int64_t r = 0; r < ends[g] - begin; ++r) {
        wrong += codes[c * ld + begin + r] != (r < rows ? expected(column[r]) : 0);
      }
    }
    begin = ends[g];
  }
  for (int64_t c = 0; c < p.cols; ++c) {  // what is left of the columns
    for (int64_t r = begin; r < ld; ++r) wrong += codes[c * ld + r] != 0;
  }
  REQUIRE(wrong == 0);
}

TEST_CASE("groups of equal extent are turned", "[grouped]") {
  const int64_t groups = 3;
  const auto [rows, cols] =
      GENERATE(std::pair<int64_t, int64_t>{16, 16}, std::pair{144, 80}, std::pair{1040, 208});
  const std::vector<float> host = random_matrix(groups * rows * cols, 14);
  const Buffer<float> x(host);
  Buffer<uint8_t> data(groups * cols * rows);
  Buffer<float> scale(groups * cols);
  Buffer<uint32_t> amax(groups * cols);
  quantize_group_columns({.x = x.data,
                          .x_dtype = Dtype::kFloat32,
                          .cols = cols,
                          .ld = cols,
                          .groups = groups,
                          .group_rows = rows,
                          .data_t = data.data,
                          .ld_t = rows,
                          .scale_t = scale.data,
                          .amax = amax.data},
                         nullptr);
  check(cudaDeviceSynchronize());
  const auto codes = data.host();
  const auto scales = scale.host();
  int64_t wrong = 0;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < cols; ++c) {
      std::vector<float> column;
      for (int64_t r = 0; r < rows; ++r) column.push_back(host[(g * rows + r) * cols + c]);
      const Codes expected(column);
      wrong += scales[g * cols + c] != expected.scale;
      for (int64_t r = 0; r < rows; ++r) {
        wrong += codes[(g * cols + c) * rows + r] != expected(column[r]);
      }
    }
  }
  REQUIRE(wrong == 0);
}

TEST_CASE("gates and their backward", "[grouped]") {
  const Problem p = problems();
  const bool interleaved = GENERATE(false, true);
  const int64_t slots = p.tokens * p.top_k;
  const Routing routing(slots, p.groups);
  const std::vector<int64_t> group = groups_of(routing);
  const std::vector<float> host_gate_up = random_matrix(slots * 2 * p.cols, 15);
  const std::vector<float> host_bias = random_matrix(p.groups * 2 * p.cols, 16);
  const std::vector<float> host_dh = random_matrix(slots * p.cols, 17);
  const std::vector<float> host_weights = random_matrix(slots, 18);
  const Buffer<float> gate_up(host_gate_up);
  const Buffer<float> bias(host_bias);
  const Buffer<float> dh(host_dh);
  const Buffer<float> weights(host_weights);
  const Buffer<int32_t> offsets(routing.offsets);
  const Buffer<int32_t> source(routing.source);
  Buffer<uint8_t> data(slots * p.cols);
  Buffer<float> scale(slots);
  Buffer<uint8_t> d_data(slots * 2 * p.cols);
  Buffer<float> d_scale(slots);
  Buffer<float> d_gate_up(slots * 2 * p.cols);
  Buffer<float> weighted_h(slots * p.cols);
  Buffer<float> d_weights(slots);
  const GateArgs gate{.gate_up = gate_up.data,
                      .dtype = Dtype::kFloat32,
                      .rows = slots,
                      .features = p.cols,
                      .groups = p.groups,
                      .offsets = offsets.data,
                      .bias = bias.data,
                      .interleaved = interleaved};
  gate_forward({.gate = gate, .data = data.data, .scale = scale.data}, nullptr);
  gate_backward({.gate = gate,
                 .dh = dh.data,
                 .weights = weights.data,
                 .source = source.data,
                 .data = d_data.data,
                 .scale = d_scale.data,
                 .d_gate_up = d_gate_up.data,
                 .weighted_h = weighted_h.data,
                 .d_weights = d_weights.data},
                nullptr);
  check(cudaDeviceSynchronize());

  const auto codes = data.host();
  const auto scales = scale.host();
  const auto d_codes = d_data.host();
  const auto d_scales = d_scale.host();
  const auto grads = d_gate_up.host();
  const auto weighted = weighted_h.host();
  const auto weight_grads = d_weights.host();
  // What fp32 makes of a few operations on values of size `size`.
  const auto near = [](double found, double exact, double size) {
    return std::fabs(found - exact) <= 32 * std::ldexp(size, -24) + 1e-30;
  };
  int64_t wrong = 0;
  for (int64_t row = 0; row < routing.rows(); ++row) {
    const int64_t slot = routing.source[row];
    const double weight = host_weights[slot];
    double dot = 0.0;
    double dot_size = 0.0;
    std::vector<float> stored_grads(grads.begin() + row * 2 * p.cols,
                                    grads.begin() + (row + 1) * 2 * p.cols);
    const Codes of_grads(stored_grads);
    wrong += d_scales[row] != of_grads.scale;
    for (int64_t f = 0; f < p.cols; ++f) {
      const int64_t g = interleaved ? 2 * f : f;
      const int64_t u = interleaved ? 2 * f + 1 : p.cols + f;
      const auto biased = [&](int64_t at) {
        return host_gate_up[row * 2 * p.cols + at] + host_bias[group[row] * 2 * p.cols + at];
      };
      const double a = biased(g);
      const double b = biased(u);
      const double sigmoid = 1.0 / (1.0 + std::exp(-a));
      const double h = a * sigmoid * b;
      const double d = weight * host_dh[row * p.cols + f];
      const double slope = sigmoid * (1.0 + a * (1.0 - sigmoid));
      const double size = (1.0 + std::fabs(a)) * (1.0 + std::fabs(b));
      wrong += !near(weighted[row * p.cols + f], weight * h, std::fabs(weight) * size);
      wrong += !near(grads[row * 2 * p.cols + g], d * b * slope, std::fabs(d) * size);
      wrong += !near(grads[row * 2 * p.cols + u], d * a * sigmoid, std::fabs(d) * size);
      wrong += d_codes[row * 2 * p.cols + g] != of_grads(stored_grads[g]);
      wrong += d_codes[row * 2 * p.cols + u] != of_grads(stored_grads[u]);
      const double decoded =
          static_cast<double>(fp8::decode<fp8::E4M3>(codes[row * p.cols + f])) * scales[row];
      // Half a code's step: 2^-4 of the value, or of the smallest normal number.
      wrong += std::fabs(decoded - h) > std::fabs(h) * 0.0626 + scales[row] * std::ldexp(1.0, -9);
      dot += host_dh[row * p.cols + f] * h;
      dot_size += std::fabs(host_dh[row * p.cols + f]) * size;
    }
    // The sum of a thread's up to 64 products or so, then of 512 threads: 64 + 9 + 16 roundings.
    wrong += std::fabs(weight_grads[slot] - dot) > 128 * std::ldexp(dot_size, -24);
  }
  REQUIRE(wrong == 0);
}

TEST_CASE("a token's rows are added up", "[grouped]") {
  const Problem p = problems();
  const int64_t slots = p.tokens * p.top_k;
  const Routing routing(slots, p.groups);
  const std::vector<float> host = random_matrix(slots * p.cols, 19);
  const std::vector<float> host_weights = random_matrix(slots, 20);
  const std::vector<float> host_bias = random_matrix(p.groups * p.cols, 21);
  const Buffer<float> x(host);
  const Buffer<float> weights(host_weights);
  const Buffer<float> bias(host_bias);
  const Buffer<int64_t> experts(routing.experts);
  const Buffer<int32_t> offsets(routing.offsets);
  const Buffer<int32_t> place(routing.place);
  Buffer<float> out(p.tokens * p.cols);
  combine({.x = x.data,
           .dtype = Dtype::kFloat32,
           .tokens = p.tokens,
           .top_k = p.top_k,
           .cols = p.cols,
           .groups = p.groups,
           .offsets = offsets.data,
           .place = place.data,
           .weights = weights.data,
           .experts = experts.data,
           .bias = bias.data,
           .out = out.data},
          nullptr);
  check(cudaDeviceSynchronize());
  const auto found = out.host();
  int64_t wrong = 0;
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t c = 0; c < p.cols; ++c) {
      float sum = 0.0F;
      for (int64_t slot = t * p.top_k; slot < (t + 1) * p.top_k; ++slot) {
        const int64_t expert = routing.experts[slot];
        if (expert < 0 || expert >= p.groups) continue;
        // volatile: rounded between the operations, whatever the compiler would contract.
        volatile float term =
            host[routing.place[slot] * p.cols + c] + host_bias[expert * p.cols + c];
        term = term * host_weights[slot];
        sum += term;
      }
      wrong += found[t * p.cols + c] != sum;
    }
  }
  REQUIRE(wrong == 0);
}

TEST_CASE("groups' rows are added up, and nobody's rows cleared", "[grouped]") {
  const Problem p = problems();
  const int64_t slots = p.tokens * p.top_k;
  const Routing routing(slots, p.groups);
  const std::vector<int64_t> group = groups_of(routing);
  const std::vector<float> host = random_matrix(p.tokens * p.cols, 22);
  const std::vector<float> host_weights = random_matrix(slots, 23);
  const std::vector<float> host_rows = random_matrix(slots * p.cols, 24);
  const std::vector<float> host_bias = random_matrix(p.groups * p.cols, 25);
  const Buffer<float> x(host);
  const Buffer<float> weights(host_weights);
  const Buffer<float> rows(host_rows);
  const Buffer<float> bias(host_bias);
  const Buffer<int32_t> offsets(routing.offsets);
  const Buffer<int32_t> source(routing.source);
  Buffer<float> sums(p.groups * p.cols);
  group_sums({.x = x.data,
              .dtype = Dtype::kFloat32,
              .cols = p.cols,
              .ld = p.cols,
              .groups = p.groups,
              .offsets = offsets.data,
              .source = source.data,
              .copies = p.top_k,
              .weights = weights.data,
              .out = sums.data},
             nullptr);
  finish_rows({.x = rows.data,
               .dtype = Dtype::kFloat32,
               .rows = slots,
               .cols = p.cols,
               .ld = p.cols,
               .groups = p.groups,
               .offsets = offsets.data,
               .bias = bias.data},
              nullptr);
  check(cudaDeviceSynchronize());

  std::vector<double> exact(p.groups * p.cols);
  std::vector<double> size(p.groups * p.cols);
  for (int64_t row = 0; row < routing.rows(); ++row) {
    const int64_t slot = routing.source[row];
    for (int64_t c = 0; c < p.cols; ++c) {
      const double term =
          static_cast<double>(host_weights[slot]) * host[slot / p.top_k * p.cols + c];
      exact[group[row] * p.cols + c] += term;
      size[group[row] * p.cols + c] += std::fabs(term);
    }
  }
  const auto found = sums.host();
  int64_t wrong = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    // An eighth of at most 1040 rows in a lane, then eight lanes.
    wrong += std::fabs(found[i] - exact[i]) > 140 * std::ldexp(size[i], -24);
  }
  const auto finished = rows.host();
  for (int64_t row = 0; row < slots; ++row) {
    for (int64_t c = 0; c < p.cols; ++c) {
      const float expected = row >= routing.rows()
                                 ? 0.0F
                                 : host_rows[row * p.cols + c] + host_bias[group[row] * p.cols + c];
      wrong += finished[row * p.cols + c] != expected;
    }
  }
  REQUIRE(wrong == 0);
}
