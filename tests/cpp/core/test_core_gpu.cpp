// fp8_core without torch, on a GPU: own memory, stream and workspace.
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
