// Rotary position embedding: the threads of a plan take every element once, and its factors turn
// back what they turned.
#include <catch2/catch.hpp>

#include "host/rope.h"

using namespace fp8;
using namespace fp8::core;

namespace {

RopeTensor tensor(int64_t batch, int64_t heads, int64_t positions) {
  return {.sizes = {batch, heads, positions}, .cos_strides = {0, 0, 64}, .sin_strides = {0, 0, 64}};
}

}  // namespace

TEST_CASE("a plan's threads hold every row and column") {
  for (const int bytes : {2, 4}) {
    for (const int64_t cols : {2, 20, 64, 80, 128, 256}) {
      for (const int64_t rotary : {int64_t{0}, int64_t{2}, cols / 4 * 2, cols}) {
        const RopeArgs args{.cols = cols, .rotary = rotary};
        for (const int64_t heads : {1, 4, 5, 32}) {
          const RopeTensor x = tensor(3, heads, 7);
          const RopePlan plan = plan_rope(args, x, bytes);
          INFO("cols=" << cols << " rotary=" << rotary << " heads=" << heads);
          const int64_t shared = plan.heads < 0 ? 1 : x.sizes[plan.heads];
          const int64_t chunk = rope_heads(bytes);
          REQUIRE(plan.chunks * chunk >= shared);
          REQUIRE((plan.chunks - 1) * chunk < shared);
          REQUIRE(plan.items == 3 * heads * 7 / shared * plan.chunks * plan.units);
          REQUIRE(plan.rotary_units * kRopePairs >= rotary / 2);
          REQUIRE((plan.units - plan.rotary_units) * 2 * kRopePairs >= cols - rotary);
        }
      }
    }
  }
}

TEST_CASE("rows that share cos and sin are a thread's") {
  const RopeArgs args{.cols = 128, .rotary = 128};
  REQUIRE(plan_rope(args, tensor(2, 32, 100), 2).heads == 1);
  REQUIRE(plan_rope(args, tensor(64, 8, 1), 2).heads == 0);  // one position, many batches
  REQUIRE(plan_rope(args, tensor(1, 1, 100), 2).heads == -1);
  RopeTensor own = tensor(1, 8, 100);  // sin differs from head to head
  own.sin_strides[1] = 6400;
  REQUIRE(plan_rope(args, own, 2).heads == -1);
  REQUIRE(rope_heads(2) == 4);
  REQUIRE(rope_heads(4) == 2);
}

TEST_CASE("the transposed factors turn back") {
  const float cos = 0.6F;
  const float sin = 0.8F;
  const RopeFactors there = rope_factors(sin, sin, false);
  const RopeFactors back = rope_factors(sin, sin, true);
  const float a = 3.0F;
  const float b = -2.0F;
  const float first = a * cos + b * there.by_b;
  const float second = b * cos + a * there.by_a;
  REQUIRE(first == Approx(a * cos - b * sin));
  REQUIRE(second == Approx(b * cos + a * sin));
  REQUIRE(first * cos + second * back.by_b == Approx(a));
  REQUIRE(second * cos + first * back.by_a == Approx(b));
}
