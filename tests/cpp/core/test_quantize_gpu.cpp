// fp8_core's quantize without torch, on a GPU: every granularity, column sums, overlapping
// launches.
#include <cuda_runtime_api.h>

#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "device_memory.h"
#include "fp8/core.h"
#include "host/formats.h"
#include "host/launch.h"

using namespace fp8::core;

TEST_CASE("quantize matches the host's encoder bit by bit") {
  const int64_t rows = 133;
  const int64_t cols = 1030;
  const std::vector<float> x = random_matrix(rows * cols, 1);
  float amax = 0.0F;
  for (const float v : x) amax = std::max(amax, std::fabs(v));
  const float multiplier = fp8::quant_multiplier(amax, 448.0F, false);
  const Quantized q(x, rows, cols, Granularity::kTensorwise, nullptr);
  REQUIRE(q.scale.host()[0] == 1.0F / multiplier);
  const std::vector<uint8_t> codes = q.data.host();
  int64_t wrong = 0;
  for (int64_t r = 0; r < pad16(rows); ++r) {
    for (int64_t c = 0; c < pad16(cols); ++c) {
      const uint8_t expected =
          r < rows && c < cols ? fp8::encode<fp8::E4M3>(x[r * cols + c] * multiplier) : 0;
      wrong += codes[r * pad16(cols) + c] != expected;
    }
  }
  REQUIRE(wrong == 0);
}

namespace {

// fp32 sums of at most 3000 values: each of 12 levels of a tree, or 3000 / 8 steps of a lane,
// rounds once.
void check_column_sums(const std::vector<float>& found, const std::vector<float>& x) {
  const auto cols = static_cast<int64_t>(found.size());
  const auto rows = static_cast<int64_t>(x.size()) / cols;
  for (int64_t c = 0; c < cols; ++c) {
    double exact = 0.0;
    double size = 0.0;
    for (int64_t r = 0; r < rows; ++r) {
      exact += x[r * cols + c];
      size += std::fabs(x[r * cols + c]);
    }
    REQUIRE(std::fabs(found[c] - exact) <= size * 400 * std::ldexp(1.0, -24));
  }
}

}  // namespace

// What a linear layer's backward asks of quantize, which no public operator does: column sums
// beside both copies, then a transposed copy with a known amax whose kernel may start while the one
// before it drains. compute-sanitizer's racecheck runs this case.
TEST_CASE("column sums, and a transposed copy that overlaps them", "[quantize]") {
  const auto granularity = GENERATE(Granularity::kTensorwise, Granularity::kRowwise);
  const bool power_of_two = GENERATE(false, true);
  const auto [rows, cols] = GENERATE(std::pair<int64_t, int64_t>{1, 1}, std::pair{130, 1040},
                                     std::pair{700, 2100}, std::pair{3000, 72});
  const std::vector<float> host_dy = random_matrix(rows * cols, 6);
  const std::vector<float> host_w = random_matrix(96 * cols, 7);
  const Buffer<float> dy(host_dy);
  const Buffer<float> weight(host_w);
  Buffer<uint8_t> data(pad16(rows) * pad16(cols));
  Buffer<uint8_t> data_t(pad16(rows) * pad16(cols));
  Buffer<uint8_t> weight_t(96 * pad16(cols));
  Buffer<float> scale(pad16(rows));
  Buffer<float> scale_t(pad16(cols));
  Buffer<float> weight_scale(pad16(cols));
  Buffer<float> sums(cols);
  const bool rowwise = granularity == Granularity::kRowwise;

  QuantizeArgs args{
      .x = dy.data, .x_dtype = Dtype::kFloat32, .rows = rows, .cols = cols, .ld = cols};
  args.granularity = granularity;
  args.power_of_two = power_of_two;
  args.dtype = rowwise ? Dtype::kE4M3 : Dtype::kE5M2;
  args.data = {data.data, pad16(rows), pad16(cols)};
  args.data_t = {data_t.data, pad16(cols), pad16(rows)};
  args.scale = scale.data;
  args.scale_t = scale_t.data;
  args.column_sum = sums.data;
  args.column_sum_dtype = Dtype::kFloat32;
  Buffer<uint8_t> workspace(quantize_workspace_bytes(args));
  args.workspace = workspace.data;

  float amax = 0.0F;
  for (const float v : host_w) amax = std::max(amax, std::fabs(v));
  const Buffer<float> known(std::vector<float>{amax});
  QuantizeArgs next{
      .x = weight.data, .x_dtype = Dtype::kFloat32, .rows = 96, .cols = cols, .ld = cols};
  next.granularity = granularity;
  next.power_of_two = power_of_two;
  next.data_t = {weight_t.data, pad16(cols), 96};
  next.scale = weight_scale.data;
  next.scale_t = weight_scale.data;
  next.pdl = true;
  if (!rowwise) next.scaling = KnownAmax{known.data};
  Buffer<uint8_t> next_workspace(quantize_workspace_bytes(next) + 16);
  next.workspace = next_workspace.data;

  quantize(args, nullptr);
  quantize(next, nullptr);
  check(cudaDeviceSynchronize());

  check_column_sums(sums.host(), host_dy);
  const auto codes = weight_t.host();
  const auto scales = weight_scale.host();
  int64_t wrong = 0;
  for (int64_t c = 0; c < cols; ++c) {
    float group = rowwise ? 0.0F : amax;
    for (int64_t r = 0; rowwise && r < 96; ++r) {
      group = std::max(group, std::fabs(host_w[r * cols + c]));
    }
    const float multiplier = fp8::quant_multiplier(group, 448.0F, power_of_two);
    wrong += scales[rowwise ? c : 0] != 1.0F / multiplier;
    for (int64_t r = 0; r < 96; ++r) {
      wrong += codes[c * 96 + r] != fp8::encode<fp8::E4M3>(host_w[r * cols + c] * multiplier);
    }
  }
  REQUIRE(wrong == 0);
}

// A layer whose weight gradient is not made in FP8 asks for the rows alone. The codes and scales
// are those of a quantization without sums, which takes another way where it is rowwise.
TEST_CASE("column sums beside the rows alone change no code", "[quantize]") {
  const auto granularity = GENERATE(Granularity::kTensorwise, Granularity::kRowwise);
  const auto [rows, cols] = GENERATE(std::pair<int64_t, int64_t>{1, 1}, std::pair{130, 1040},
                                     std::pair{700, 2100}, std::pair{3000, 72});
  const std::vector<float> host_dy = random_matrix(rows * cols, 8);
  const Quantized plain(host_dy, rows, cols, granularity, nullptr);
  const Buffer<float> dy(host_dy);
  Buffer<uint8_t> data(pad16(rows) * pad16(cols));
  Buffer<float> scale(granularity == Granularity::kRowwise ? pad16(rows) : 1);
  Buffer<float> sums(cols);
  check(cudaMemset(data.data, 0xFF, data.count));
  QuantizeArgs args{
      .x = dy.data, .x_dtype = Dtype::kFloat32, .rows = rows, .cols = cols, .ld = cols};
  args.granularity = granularity;
  args.data = {data.data, pad16(rows), pad16(cols)};
  args.scale = scale.data;
  args.column_sum = sums.data;
  Buffer<uint8_t> workspace(quantize_workspace_bytes(args));
  args.workspace = workspace.data;
  quantize(args, nullptr);
  check(cudaDeviceSynchronize());

  REQUIRE(data.host() == plain.data.host());
  std::vector<float> plain_scale = plain.scale.host();
  plain_scale.resize(scale.count);
  REQUIRE(scale.host() == plain_scale);
  check_column_sums(sums.host(), host_dy);
}

// 17 MB, whose tiles are ragged on both sides: one launch where the caller allows it, with the same
// bits. compute-sanitizer's racecheck runs this case.
TEST_CASE("one launch that takes the whole GPU changes no bit", "[quantize]") {
  const auto granularity = GENERATE(Granularity::kTensorwise, Granularity::kRowwise);
  const bool data = GENERATE(true, false);
  const int64_t rows = 2800;
  const int64_t cols = 1500;
  const Buffer<float> x(random_matrix(rows * cols, 9));
  std::vector<std::vector<uint8_t>> copies;
  std::vector<std::vector<float>> scales;
  for (const bool whole_gpu : {false, true}) {
    Buffer<uint8_t> rows_out(pad16(rows) * pad16(cols));
    Buffer<uint8_t> transposed(pad16(rows) * pad16(cols));
    Buffer<float> scale(pad16(rows));
    Buffer<float> scale_t(pad16(cols));
    for (auto* buffer : {&rows_out, &transposed}) {
      check(cudaMemset(buffer->data, 0xFF, buffer->count));
    }
    for (auto* buffer : {&scale, &scale_t}) check(cudaMemset(buffer->data, 0, 4 * buffer->count));
    QuantizeArgs args{
        .x = x.data, .x_dtype = Dtype::kFloat32, .rows = rows, .cols = cols, .ld = cols};
    args.granularity = granularity;
    if (data) args.data = {rows_out.data, pad16(rows), pad16(cols)};
    args.data_t = {transposed.data, pad16(cols), pad16(rows)};
    args.scale = scale.data;
    args.scale_t = scale_t.data;
    args.whole_gpu = whole_gpu;
    Buffer<uint8_t> workspace(quantize_workspace_bytes(args));
    args.workspace = workspace.data;
    quantize(args, nullptr);
    check(cudaDeviceSynchronize());
    copies.push_back(rows_out.host());
    copies.push_back(transposed.host());
    scales.push_back(scale.host());
    scales.push_back(scale_t.host());
  }
  REQUIRE(copies[0] == copies[2]);
  REQUIRE(copies[1] == copies[3]);
  REQUIRE(scales[0] == scales[2]);
  REQUIRE(scales[1] == scales[3]);
}

// Every scaling group, both copies, column sums, then a transposed copy that overlaps them, for
// blocks. compute-sanitizer's racecheck runs this case.
TEST_CASE("blocks match the host's encoder bit by bit", "[quantize]") {
  const bool square = GENERATE(false, true);
  const bool power_of_two = GENERATE(false, true);
  const auto [rows, cols] = GENERATE(std::pair<int64_t, int64_t>{1, 1}, std::pair{130, 1040},
                                     std::pair{300, 600}, std::pair{17, 129}, std::pair{515, 72});
  std::vector<float> host_x = random_matrix(rows * cols, 8);
  if (rows > 16) host_x[16 * cols] = std::numeric_limits<float>::quiet_NaN();
  const Buffer<float> x(host_x);
  const int64_t ld = pad16(cols);
  const int64_t ld_t = pad16(rows);
  Buffer<uint8_t> data(ld_t * ld);
  Buffer<uint8_t> data_t(ld * ld_t);
  Buffer<uint8_t> again(ld * ld_t);
  const auto count = [&](int64_t of, int64_t along) {
    return square ? blocks_of(of) * square_scale_ld(along) : blocks_of(along) * of;
  };
  Buffer<float> scale(count(ld_t, ld));
  Buffer<float> scale_t(count(ld, ld_t));
  Buffer<float> sums(cols);

  QuantizeArgs args{
      .x = x.data, .x_dtype = Dtype::kFloat32, .rows = rows, .cols = cols, .ld = cols};
  args.granularity = square ? Granularity::kBlock128x128 : Granularity::kBlock1x128;
  args.power_of_two = power_of_two;
  args.data = {data.data, ld_t, ld};
  args.data_t = {data_t.data, ld, ld_t};
  args.scale = scale.data;
  args.scale_t = scale_t.data;
  args.column_sum = sums.data;
  Buffer<uint8_t> workspace(quantize_workspace_bytes(args));
  args.workspace = workspace.data;
  quantize(args, nullptr);
  QuantizeArgs next = args;
  next.data = {};
  next.data_t.data = again.data;
  next.column_sum = nullptr;
  next.pdl = true;
  REQUIRE(quantize_workspace_bytes(next) == 0);
  quantize(next, nullptr);
  check(cudaDeviceSynchronize());

  // x (r, c), or of x^T; NaN takes part in no group but its own
  const auto check_copy = [&](bool transposed, const std::vector<uint8_t>& codes,
                              const std::vector<float>& scales) {
    const int64_t height = transposed ? cols : rows;
    const int64_t width = transposed ? rows : cols;
    const int64_t stride = pad16(width);
    const auto at = [&](int64_t r, int64_t c) {
      return transposed ? host_x[c * cols + r] : host_x[r * cols + c];
    };
    int64_t wrong = 0;
    for (int64_t r = 0; r < pad16(height); ++r) {
      for (int64_t c0 = 0; c0 < stride; c0 += kScaleBlock) {
        const int64_t first = square ? r / kScaleBlock * kScaleBlock : r;
        const int64_t last = std::min(square ? first + kScaleBlock : r + 1, height);
        uint32_t bits = 0;
        for (int64_t i = first; i < last; ++i) {
          for (int64_t c = c0; c < std::min(c0 + kScaleBlock, width); ++c) {
            bits = std::max(bits, fp8::magnitude_bits(at(i, c)));
          }
        }
        const float multiplier =
            fp8::quant_multiplier(std::bit_cast<float>(bits), 448.0F, power_of_two);
        const int64_t block = c0 / kScaleBlock;
        const int64_t place =
            square ? r / kScaleBlock * square_scale_ld(stride) + block : block * pad16(height) + r;
        const float expected_scale = 1.0F / multiplier;
        wrong += !(scales[place] == expected_scale ||
                   (std::isnan(scales[place]) && std::isnan(expected_scale)));
        for (int64_t c = c0; c < std::min(c0 + kScaleBlock, stride); ++c) {
          const uint8_t expected =
              r < height && c < width ? fp8::encode<fp8::E4M3>(at(r, c) * multiplier) : 0;
          wrong += codes[r * stride + c] != expected;
        }
      }
    }
    return wrong;
  };
  const std::vector<float> scales_t = scale_t.host();
  REQUIRE(check_copy(false, data.host(), scale.host()) == 0);
  REQUIRE(check_copy(true, data_t.host(), scales_t) == 0);
  REQUIRE(again.host() == data_t.host());
  const auto found = sums.host();
  for (int64_t c = 0; c < cols; ++c) {
    double exact = 0.0;
    double size = 0.0;
    for (int64_t r = 0; r < rows; ++r) {
      exact += host_x[r * cols + c];
      size += std::fabs(host_x[r * cols + c]);
    }
    if (std::isnan(exact)) {
      REQUIRE(std::isnan(found[c]));
    } else {
      // Eight rows in a thread, 16 of these, then at most five tiles: 28 roundings.
      REQUIRE(std::fabs(found[c] - exact) <= size * 28 * std::ldexp(1.0, -24));
    }
  }
}
