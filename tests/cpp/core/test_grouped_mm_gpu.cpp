// The grouped matmul from C++ without torch, and what only C++ can ask of it: results that are
// added. Its values in general: tests/python/grouped/test_grouped_mm.py.
#include <catch2/catch.hpp>
#include <vector>

#include "device_memory.h"
#include "fp8/core_grouped.h"

using namespace fp8::core;

namespace {

// 1, 2, -1 or 0 in e4m3: every sum is exact, also in the tensor cores.
std::vector<uint8_t> small_codes(size_t count, unsigned seed) {
  constexpr uint8_t kCodes[] = {0x38, 0x40, 0xB8, 0x00};
  std::mt19937 engine(seed);
  std::vector<uint8_t> codes(count);
  for (uint8_t& code : codes) code = kCodes[engine() % 4];
  return codes;
}

float value(uint8_t code) {
  return code == 0x38 ? 1.0F : code == 0x40 ? 2.0F : code == 0xB8 ? -1.0F : 0.0F;
}

}  // namespace

TEST_CASE("weight gradients of groups are added to fp32, or overwrite it", "[grouped]") {
  const int64_t m = 72;
  const int64_t n = 144;
  const std::vector<int32_t> ends = {32, 32, 192, 256};  // the second has no columns
  const int64_t k = 288;
  const auto groups = static_cast<int64_t>(ends.size());
  const std::vector<uint8_t> a = small_codes(m * k, 1);
  const std::vector<uint8_t> b = small_codes(n * k, 2);
  const Buffer<uint8_t> a_codes(a);
  const Buffer<uint8_t> b_codes(b);
  const Buffer<int32_t> offsets(ends);
  const Buffer<float> a_scale(std::vector<float>(groups * m, 2.0F));
  const Buffer<float> b_scale(std::vector<float>(groups * n, 0.25F));
  const bool accumulate = GENERATE(false, true);
  Buffer<float> out(std::vector<float>(groups * m * n, 3.0F));
  const GroupedMmArgs args{.columns = true,
                           .groups = groups,
                           .m = m,
                           .n = n,
                           .k = k,
                           .offsets = offsets.data,
                           .a = a_codes.data,
                           .b = b_codes.data,
                           .a_scale = a_scale.data,
                           .b_scale = b_scale.data,
                           .out = out.data,
                           .out_dtype = Dtype::kFloat32,
                           .fast_accum = GENERATE(false, true),
                           .accumulate = accumulate};
  if (!suits_grouped_mm(args)) return;  // no Hopper
  grouped_mm(args, nullptr);
  check(cudaDeviceSynchronize());
  const std::vector<float> found = out.host();
  int64_t wrong = 0;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < m * n; ++i) {
      float sum = 0.0F;
      for (int64_t c = g == 0 ? 0 : ends[g - 1]; c < ends[g]; ++c) {
        sum += value(a[i / n * k + c]) * value(b[i % n * k + c]);
      }
      wrong += found[g * m * n + i] != sum * 0.5F + (accumulate ? 3.0F : 0.0F);
    }
  }
  REQUIRE(wrong == 0);
}

TEST_CASE("grouped matmuls refuse what they cannot do", "[grouped]") {
  GroupedMmArgs args{.groups = 1, .m = 16, .n = 12, .k = 32};
  REQUIRE(!suits_grouped_mm(args));
  REQUIRE_THROWS_AS(grouped_mm(args, nullptr), Error);
  args.n = 16;
  args.accumulate = true;  // to bf16
  REQUIRE_THROWS_AS(grouped_mm(args, nullptr), Error);
}
