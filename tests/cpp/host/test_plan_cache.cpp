// The plan cache: complete keys, least recently used out first, safe in threads.
#include <catch2/catch.hpp>
#include <set>
#include <thread>
#include <vector>

#include "host/plan_cache.h"
#include "host/plan_key.h"

using namespace fp8::core;

namespace {

struct IntHash {
  size_t operator()(int key) const { return static_cast<size_t>(key); }
};
using Cache = PlanCache<int, int, IntHash>;

MatmulArgs problem() {
  MatmulArgs args;
  args.m = 64;
  args.n = 32;
  args.k = 48;
  args.lda = args.ldb = 48;
  args.ldo = 32;
  args.a = args.b = args.out = reinterpret_cast<void*>(0x1000);
  return args;
}

}  // namespace

TEST_CASE("finds what was inserted and counts") {
  Cache cache(2);
  REQUIRE_FALSE(cache.find(1));
  cache.insert(1, 10);
  REQUIRE(cache.find(1) == 10);
  cache.insert(1, 11);  // the first plan stays
  REQUIRE(cache.find(1) == 10);
  REQUIRE(cache.info().hits == 2);
  REQUIRE(cache.info().misses == 1);
  cache.clear();
  REQUIRE(cache.info().size == 0);
  REQUIRE(cache.info().hits == 0);
}

TEST_CASE("replaces a plan, and counts plans of a kind") {
  Cache cache(2);
  cache.insert(1, 10);
  cache.replace(1, 11);
  cache.replace(2, 20);  // not known yet
  REQUIRE(cache.find(1) == 11);
  REQUIRE(cache.find(2) == 20);
  cache.replace(3, 30);  // the bound holds here too
  REQUIRE(cache.info().size == 2);
  REQUIRE_FALSE(cache.find(1));
  REQUIRE(cache.count_if([](int plan) { return plan > 20; }) == 1);
}

TEST_CASE("forgets the least recently used plan") {
  Cache cache(2);
  cache.insert(1, 10);
  cache.insert(2, 20);
  cache.find(1);
  cache.insert(3, 30);
  REQUIRE(cache.find(1) == 10);
  REQUIRE_FALSE(cache.find(2));
  REQUIRE(cache.find(3) == 30);
  REQUIRE(cache.info().size == 2);
}

TEST_CASE("threads share it") {
  Cache cache(64);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20000; ++i) {
        const int key = (i * 7 + t) % 100;
        if (const auto plan = cache.find(key)) {
          wrong += *plan != key * 10;
        } else {
          cache.insert(key, key * 10);
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  REQUIRE(wrong == 0);
  REQUIRE(cache.info().size <= 64);
}

TEST_CASE("the key holds all that changes a plan") {
  const PlanKey base = make_plan_key(problem(), 0);
  std::vector<MatmulArgs> others(17, problem());
  others[0].m = 65;
  others[1].n = 48;
  others[2].k = 64;
  others[3].lda = 64;
  others[4].ldb = 64;
  others[5].ldo = 64;
  others[6].a_dtype = Dtype::kE5M2;
  others[7].b_dtype = Dtype::kE5M2;
  others[8].out_dtype = Dtype::kFloat16;
  others[9].bias = reinterpret_cast<void*>(0x1000);
  others[10].accumulate = true;
  others[11].fast_accum = false;
  others[12].granularity = Granularity::kRowwise;
  others[13].out = reinterpret_cast<void*>(0x1010);  // alignment 16 instead of 256
  others[14].granularity = Granularity::kBlock1x128;
  others[15].granularity = Granularity::kBlock1x128;
  others[15].granularity_b = Granularity::kBlock128x128;
  others[16].granularity = Granularity::kBlock128x128;
  others[16].granularity_b = Granularity::kBlock1x128;
  std::set<size_t> hashes{PlanKeyHash()(base)};
  for (const MatmulArgs& other : others) {
    const PlanKey key = make_plan_key(other, 0);
    REQUIRE_FALSE(key == base);
    hashes.insert(PlanKeyHash()(key));
  }
  REQUIRE_FALSE(make_plan_key(problem(), 1) == base);
  REQUIRE(hashes.size() == others.size() + 1);

  MatmulArgs moved = problem();
  moved.a = reinterpret_cast<void*>(0x2000);  // another address of the same alignment class
  REQUIRE(make_plan_key(moved, 0) == base);
}

TEST_CASE("what changes nothing is not in the key") {
  MatmulArgs args = problem();
  args.granularity = Granularity::kBlock1x128;
  MatmulArgs other = args;
  other.granularity_b = Granularity::kBlock1x128;  // as without
  other.fast_accum = !args.fast_accum;             // without effect on blocks
  REQUIRE(make_plan_key(args, 0) == make_plan_key(other, 0));
}

TEST_CASE("permuted extents hash apart") {
  std::set<size_t> hashes;
  for (const auto& [m, n, k] : {std::array{16, 32, 64},
                                {16, 64, 32},
                                {32, 16, 64},
                                {32, 64, 16},
                                {64, 16, 32},
                                {64, 32, 16}}) {
    MatmulArgs args = problem();
    args.m = m;
    args.n = n;
    args.k = k;
    hashes.insert(PlanKeyHash()(make_plan_key(args, 0)));
  }
  REQUIRE(hashes.size() == 6);
}

TEST_CASE("alignment classes") {
  REQUIRE(alignment_of(nullptr) == 256);
  REQUIRE(alignment_of(reinterpret_cast<void*>(0x1001)) == 1);
  REQUIRE(alignment_of(reinterpret_cast<void*>(0x1010)) == 16);
  REQUIRE(alignment_of(reinterpret_cast<void*>(0x10000)) == 256);
}

// For ThreadSanitizer: find, insert, eviction, info and clear at once, on plans as they are.
TEST_CASE("two threads share plans while a third looks on") {
  PlanCache<PlanKey, MatmulPlan, PlanKeyHash> cache(8);
  std::atomic<int> wrong{0};
  const auto use = [&](int64_t first) {
    for (int64_t i = 0; i < 3000; ++i) {
      MatmulArgs args = problem();
      args.m = 1 + (first + i) % 12;
      const PlanKey key = make_plan_key(args, 0);
      if (const auto plan = cache.find(key)) {
        wrong += plan->workspace_bytes != static_cast<size_t>(args.m);
        wrong += plan->state[args.m] != static_cast<unsigned char>(args.m);
      } else {
        MatmulPlan made{};
        made.workspace_bytes = static_cast<size_t>(args.m);
        made.state[args.m] = static_cast<unsigned char>(args.m);
        cache.insert(key, made);
      }
    }
  };
  std::thread one(use, 0), two(use, 5);
  for (int i = 0; i < 200; ++i) {
    wrong += cache.info().size > 8;
    if (i % 50 == 0) cache.clear();
  }
  one.join();
  two.join();
  REQUIRE(wrong == 0);
}
