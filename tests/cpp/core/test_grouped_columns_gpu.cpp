// Transposed operands and gates around grouped matmuls; see test_grouped_gpu.cpp.
#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <vector>

#include "device_memory.h"
#include "fp8/core_grouped.h"
#include "grouped_problem.h"
#include "host/formats.h"

using namespace fp8::core;

TEST_CASE("groups' columns are quantized and transposed", "[grouped]") {
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
    REQUIRE(ends[g] == begin + padded_group(rows));
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

TEST_CASE("groups of equal extent are transposed", "[grouped]") {
  struct Extent {
    int64_t groups;
    int64_t rows;
    int64_t cols;
  };
  const auto [groups, rows, cols] =
      GENERATE(Extent{3, 16, 16}, Extent{3, 144, 80}, Extent{3, 1040, 208}, Extent{280, 16, 1040});
  const std::vector<float> host = random_matrix(groups * rows * cols, 14);
  const bool known = GENERATE(false, true);  // by the pass over rows, which this one follows
  const Buffer<float> x(host);
  Buffer<uint8_t> data(groups * cols * rows);
  Buffer<float> scale(groups * cols);
  Buffer<uint32_t> amax(groups * cols);
  if (known) {
    Buffer<uint8_t> row_data(groups * rows * cols);
    Buffer<float> row_scale(groups * rows);
    quantize({.x = x.data,
              .x_dtype = Dtype::kFloat32,
              .rows = groups * rows,
              .cols = cols,
              .ld = cols,
              .granularity = Granularity::kRowwise,
              .data = {row_data.data, groups * rows, cols},
              .scale = row_scale.data,
              .column_amax = reinterpret_cast<float*>(amax.data),
              .group_rows = rows},
             nullptr);
    check(cudaDeviceSynchronize());
    const auto codes = row_data.host();
    const auto scales = row_scale.host();
    int64_t wrong = 0;
    for (int64_t r = 0; r < groups * rows; ++r) {
      const std::vector<float> row(host.begin() + r * cols, host.begin() + (r + 1) * cols);
      const Codes expected(row);
      wrong += scales[r] != expected.scale;
      for (int64_t c = 0; c < cols; ++c) wrong += codes[r * cols + c] != expected(row[c]);
    }
    REQUIRE(wrong == 0);
  }
  quantize_group_columns({.x = x.data,
                          .x_dtype = Dtype::kFloat32,
                          .cols = cols,
                          .ld = cols,
                          .groups = groups,
                          .group_rows = rows,
                          .data_t = data.data,
                          .ld_t = rows,
                          .scale_t = scale.data,
                          .amax = amax.data,
                          .amax_is_known = known},
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

// Gates large enough that the sigmoid's denominator overflows, beside usual ones; the backward's
// weighted_h, of weights of 1, says what h is to the bit.
TEST_CASE("gates of rows without groups, in either format, with powers of two", "[grouped]") {
  const int64_t features = GENERATE(48, 2064, 16400);
  const auto dtype = GENERATE(Dtype::kE4M3, Dtype::kE5M2);
  const bool power_of_two = GENERATE(false, true);
  CAPTURE(features, power_of_two);
  constexpr int64_t kRows = 37;
  std::vector<float> host = random_matrix(kRows * 2 * features, 21);
  for (size_t i = 0; i < host.size(); i += 3) host[i] *= 60.0F;
  std::vector<int32_t> rows(kRows);
  for (int32_t i = 0; i < kRows; ++i) rows[i] = i;
  const Buffer<float> gate_up(host);
  const Buffer<float> dh(random_matrix(kRows * features, 22));
  const Buffer<float> weights(std::vector<float>(kRows, 1.0F));
  const Buffer<int32_t> source(rows);
  Buffer<uint8_t> data(kRows * features);
  Buffer<float> scale(kRows);
  Buffer<float> weighted_h(kRows * features);
  const GateArgs gate{
      .gate_up = gate_up.data, .dtype = Dtype::kFloat32, .rows = kRows, .features = features};
  gate_forward({.gate = gate,
                .data = data.data,
                .scale = scale.data,
                .dtype = dtype,
                .power_of_two = power_of_two},
               nullptr);
  gate_backward({.gate = gate,
                 .dh = dh.data,
                 .weights = weights.data,
                 .source = source.data,
                 .weighted_h = weighted_h.data},
                nullptr);
  check(cudaDeviceSynchronize());
  const auto codes = data.host();
  const auto scales = scale.host();
  const auto h = weighted_h.host();
  int64_t wrong = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    float amax = 0.0F;
    for (int64_t f = 0; f < features; ++f) amax = std::max(amax, std::fabs(h[row * features + f]));
    const float multiplier = fp8::quant_multiplier(amax, fp8::fp8_max(dtype), power_of_two);
    wrong += scales[row] != 1.0F / multiplier;
    for (int64_t f = 0; f < features; ++f) {
      const float value = h[row * features + f] * multiplier;
      const uint8_t expected =
          dtype == Dtype::kE4M3 ? fp8::encode<fp8::E4M3>(value) : fp8::encode<fp8::E5M2>(value);
      wrong += codes[row * features + f] != expected;
    }
  }
  REQUIRE(wrong == 0);
}
