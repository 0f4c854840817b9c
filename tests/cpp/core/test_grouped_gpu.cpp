// Routing, scattering and adding up of rows around grouped matmuls, without torch, against plain
// loops on the host. compute-sanitizer's racecheck runs them: no other library's kernel is in this
// process.
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
