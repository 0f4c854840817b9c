// fp8_core without torch, on a GPU: own memory, stream and workspace.
#include <cuda_runtime_api.h>

#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/formats.h"
#include "common/launch.h"
#include "device_memory.h"
#include "fp8/core.h"

using namespace fp8::core;

namespace {

// A quantized matrix on the device, padded, tensorwise or rowwise.
struct Quantized {
  int64_t rows, cols;
  Buffer<uint8_t> data;
  Buffer<float> scale;

  Quantized(const std::vector<float>& host, int64_t rows_, int64_t cols_, Granularity granularity,
            cudaStream_t stream)
      : rows(rows_), cols(cols_), data(pad16(rows) * pad16(cols)), scale(pad16(rows)) {
    Buffer<float> x(host);
    QuantizeArgs args{
        .x = x.data, .x_dtype = Dtype::kFloat32, .rows = rows, .cols = cols, .ld = cols};
    args.granularity = granularity;
    args.data = {data.data, pad16(rows), pad16(cols)};
    args.scale = scale.data;
    Buffer<uint8_t> workspace(quantize_workspace_bytes(args));
    args.workspace = workspace.data;
    quantize(args, stream);
    check(cudaStreamSynchronize(stream));
  }
};

}  // namespace

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
  next.overlaps_previous = true;
  if (!rowwise) next.amax = known.data;
  Buffer<uint8_t> next_workspace(quantize_workspace_bytes(next) + 16);
  next.workspace = next_workspace.data;

  quantize(args, nullptr);
  quantize(next, nullptr);
  check(cudaDeviceSynchronize());

  const auto found = sums.host();
  for (int64_t c = 0; c < cols; ++c) {
    double exact = 0.0;
    double size = 0.0;
    for (int64_t r = 0; r < rows; ++r) {
      exact += host_dy[r * cols + c];
      size += std::fabs(host_dy[r * cols + c]);
    }
    // fp32 sums of at most 3000 values: each of 12 levels of a tree, or 3000 / 8 steps of a lane,
    // rounds once.
    REQUIRE(std::fabs(found[c] - exact) <= size * 400 * std::ldexp(1.0, -24));
  }
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

TEST_CASE("matmul on an own stream matches the dequantized product") {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const int64_t m = 37;
  const int64_t n = 64;
  const int64_t k = 160;
  for (const Granularity granularity : {Granularity::kTensorwise, Granularity::kRowwise}) {
    const Quantized a(random_matrix(m * k, 2), m, k, granularity, stream);
    const Quantized b(random_matrix(n * k, 3), n, k, granularity, stream);
    Buffer<float> out(m * n);
    MatmulArgs args{.m = m, .n = n, .k = k};
    args.a = a.data.data;
    args.lda = k;
    args.b = b.data.data;
    args.ldb = k;
    args.granularity = granularity;
    args.scale_a = a.scale.data;
    args.scale_b = b.scale.data;
    args.out = out.data;
    args.out_dtype = Dtype::kFloat32;
    args.ldo = n;
    args.fast_accum = false;
    const MatmulPlan plan = plan_matmul(args, stream);
    if (!plan.supported) {
      WARN("this GPU has no algorithm for the granularity");
      continue;
    }
    Buffer<uint8_t> workspace(plan.workspace_bytes + 256);
    run_matmul(plan, args, workspace.data, stream);
    check(cudaStreamSynchronize(stream));

    const auto code_a = a.data.host();
    const auto code_b = b.data.host();
    const auto scale_a = a.scale.host();
    const auto scale_b = b.scale.host();
    const auto result = out.host();
    const bool rowwise = granularity == Granularity::kRowwise;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0.0;
        double size = 0.0;
        for (int64_t p = 0; p < k; ++p) {
          const double product = static_cast<double>(fp8::decode<fp8::E4M3>(code_a[i * k + p])) *
                                 fp8::decode<fp8::E4M3>(code_b[j * k + p]);
          sum += product;
          size += std::fabs(product);
        }
        const double scale =
            static_cast<double>(scale_a[rowwise ? i : 0]) * scale_b[rowwise ? j : 0];
        // Tensor cores keep about 14 bits of a partial sum over 32 products, also between
        // promotions.
        REQUIRE(std::fabs(result[i * n + j] - sum * scale) <= size * scale * std::ldexp(1.0, -12));
      }
    }
  }
  check(cudaStreamDestroy(stream));
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
  next.overlaps_previous = true;
  REQUIRE(quantize_workspace_bytes(next) == 0);
  quantize(next, nullptr);
  check(cudaDeviceSynchronize());

  // x (r, c), or of x^T; NaN takes part in no group but its own
  const auto check_copy = [&](bool turned, const std::vector<uint8_t>& codes,
                              const std::vector<float>& scales) {
    const int64_t height = turned ? cols : rows;
    const int64_t width = turned ? rows : cols;
    const int64_t stride = pad16(width);
    const auto at = [&](int64_t r, int64_t c) {
      return turned ? host_x[c * cols + r] : host_x[r * cols + c];
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

TEST_CASE("candidates, and a plan that is remembered") {
  plan_cache_clear();
  const int64_t m = 96;
  const int64_t n = 512;
  const int64_t k = 2048;
  const Quantized a(random_matrix(m * k, 4), m, k, Granularity::kTensorwise, nullptr);
  const Quantized b(random_matrix(n * k, 5), n, k, Granularity::kTensorwise, nullptr);
  Buffer<float> out(m * n);
  MatmulArgs args{.m = m, .n = n, .k = k};
  args.a = a.data.data;
  args.lda = k;
  args.b = b.data.data;
  args.ldb = k;
  args.scale_a = a.scale.data;
  args.scale_b = b.scale.data;
  args.out = out.data;
  args.out_dtype = Dtype::kFloat32;
  args.ldo = n;
  args.fast_accum = false;
  const MatmulPlan first = plan_matmul(args, nullptr);
  const std::vector<MatmulPlan> candidates = matmul_candidates(args, 8, nullptr);
  if (!first.supported) {
    WARN("this GPU has no algorithm");
    REQUIRE(candidates.empty());
    return;
  }
  REQUIRE_FALSE(first.tuned);
  REQUIRE_FALSE(candidates.empty());
  REQUIRE(candidates.size() <= 8);
  REQUIRE(algorithm_of(candidates.front()) == algorithm_of(first));
  REQUIRE(matmul_candidates(args, 1, nullptr).size() == 1);

  // Sums of 2048 products, promoted every 128: far below 1% of the largest apart.
  Buffer<uint8_t> workspace(size_t{32} << 20);
  std::vector<float> expected;
  for (const MatmulPlan& plan : candidates) {
    run_matmul(plan, args, workspace.data, nullptr);
    check(cudaDeviceSynchronize());
    const std::vector<float> result = out.host();
    if (expected.empty()) expected = result;
    float largest = 0.0F;
    float difference = 0.0F;
    for (size_t i = 0; i < result.size(); ++i) {
      largest = std::max(largest, std::fabs(expected[i]));
      difference = std::max(difference, std::fabs(result[i] - expected[i]));
    }
    REQUIRE(difference <= 0.01F * largest);
  }

  remember_plan(args, candidates.back());
  const MatmulPlan found = plan_matmul(args, nullptr);
  REQUIRE(found.tuned);
  REQUIRE(algorithm_of(found) == algorithm_of(candidates.back()));
  REQUIRE(plan_cache_info().size == 1);
  REQUIRE(plan_cache_info().tuned == 1);
  plan_cache_clear();
  REQUIRE(plan_cache_info().tuned == 0);
  REQUIRE_FALSE(plan_matmul(args, nullptr).tuned);

  for (const MatmulPlan& plan : candidates) {
    const MatmulPlan restored = plan_with_algorithm(args, algorithm_of(plan));
    REQUIRE(restored.supported);
    REQUIRE(algorithm_of(restored) == algorithm_of(plan));
  }
  MatmulAlgorithm algorithm = algorithm_of(first);
  algorithm.workspace_bytes = (size_t{32} << 20) + 1;
  REQUIRE_FALSE(plan_with_algorithm(args, algorithm).supported);
  algorithm = algorithm_of(first);
  algorithm.words.fill(~uint64_t{0});
  REQUIRE_FALSE(plan_with_algorithm(args, algorithm).supported);
  args.k = 40;  // not a multiple of 16
  REQUIRE_FALSE(plan_with_algorithm(args, algorithm_of(first)).supported);
  REQUIRE(matmul_candidates(args, 8, nullptr).empty());
}

TEST_CASE("a wrong request is refused with a message") {
  QuantizeArgs args{.x = nullptr, .rows = 0, .cols = 4, .ld = 4};
  REQUIRE_THROWS_WITH(quantize(args, nullptr), Catch::Contains("not empty"));
  args.rows = 1;
  REQUIRE_THROWS_WITH(quantize(args, nullptr), Catch::Contains("nothing to make"));
}
