// The plan of core::decode: every row of the weight has one tile, everything fits into shared
// memory where the kernel looks for it, and what decides a row's bits does not depend on m.
#include <catch2/catch.hpp>

#include "host/decode_plan.h"

using namespace fp8::core;

namespace {

constexpr int kShared = 227 * 1024;

const int64_t kExtents[] = {1, 16, 100, 1000, 1024, 4096, 6152, 14336, 28672, 57344};

}  // namespace

TEST_CASE("tiles of a decode cover the weight once") {
  for (const int64_t n : kExtents) {
    const int rows = decode_tile_rows(n, 132, kMmaTileRows);
    REQUIRE(rows % 8 == 0);
    REQUIRE(rows >= 16);
    REQUIRE(rows <= kMmaTileRows);
  }
  REQUIRE(decode_tile_rows(4096, 132, 64) == 32);
  REQUIRE(decode_tile_rows(6144, 132, 64) == 48);
  REQUIRE(decode_tile_rows(28672, 132, 64) == 56);  // 4 tiles each, of 217 rows
}

TEST_CASE("a decode's shared memory holds what the kernel puts there") {
  for (const int64_t m : {1, 8, 9, 16, 17, 33, 64}) {
    for (const int64_t n : kExtents) {
      for (const int64_t k : kExtents) {
        for (const bool blocks : {false, true}) {
          for (const DecodeSource source : {DecodeSource::kQuantized, DecodeSource::kStreamed}) {
            const DecodePlan p = plan_decode(m, n, k, blocks, source, kMmaTileRows, 132, kShared);
            if (p.stages == 0) continue;
            INFO("m=" << m << " n=" << n << " k=" << k << " source=" << static_cast<int>(source));
            REQUIRE(p.tokens >= m);
            REQUIRE(p.tiles * p.tile_rows >= n);
            REQUIRE((p.tiles - 1) * p.tile_rows < n);
            REQUIRE(p.blocks <= std::min<int64_t>(132, p.tiles));
            REQUIRE(p.k_boxes % 2 == 0);
            REQUIRE(p.k_boxes * kDecodeBoxCols >= k);
            REQUIRE(p.stage_bytes % kDecodeBoxAlign == 0);
            REQUIRE(p.x_offset % kDecodeBoxAlign == 0);
            REQUIRE(p.scales_offset % 8 == 0);
            REQUIRE(p.barriers_offset % 8 == 0);
            const bool streams = source == DecodeSource::kStreamed;
            const int64_t x = streams ? 0 : p.k_boxes * p.tokens * kDecodeBoxCols;
            REQUIRE(p.sums_offset >= p.x_offset + x);
            REQUIRE(p.scales_offset - p.sums_offset >= kDecodeGroups * p.tokens * p.sums_pitch * 4);
            REQUIRE(p.amax_offset >= p.barriers_offset + 16 * p.stages);
            REQUIRE(p.shared_bytes >= p.amax_offset + 4 * p.tokens);
            // the last box, read as 64 rows
            const int last = p.x_offset - p.stage_bytes + p.tile_rows * kDecodeBoxCols;
            REQUIRE(p.shared_bytes >= last + kMmaTileRows * kDecodeBoxCols);
            REQUIRE(p.shared_bytes <= kShared);
          }
        }
      }
    }
  }
}

TEST_CASE("a decode is chosen up to some number of rows, and not beyond") {
  struct Scales {
    bool blocks, one_scale;
  };
  for (const int64_t n : kExtents) {
    for (const int64_t k : kExtents) {
      for (const auto& [blocks, one_scale] : {Scales{}, Scales{true, false}, Scales{false, true}}) {
        const int64_t most = most_decode_rows({1, n, k, blocks, one_scale});
        const bool one = choose_decode({1, n, k, blocks, one_scale}, 132, kShared).stages > 0;
        for (int64_t m = 1; m <= kMaxDecodeRows + 1; ++m) {
          const DecodePlan plan = choose_decode({m, n, k, blocks, one_scale}, 132, kShared);
          INFO("m=" << m << " n=" << n << " k=" << k);
          REQUIRE((plan.stages > 0) == (one && m <= most));
          REQUIRE(plan.stages % kDecodeGroups == 0);  // see decode.cuh, DecodeRing
        }
      }
    }
  }
}

TEST_CASE("rows from which on matmul is faster than a decode") {
  REQUIRE(most_decode_rows({.n = 28672, .k = 4096}) == 64);
  REQUIRE(most_decode_rows({.n = 4096, .k = 4096, .one_scale = true}) == 32);
  REQUIRE(most_decode_rows({.n = 6144, .k = 4096, .blocks = true}) == 64);
  REQUIRE(most_decode_rows({.n = 14336, .k = 4096, .blocks = true}) == 32);
  REQUIRE(most_decode_rows({.n = 4096, .k = 14336, .blocks = true}) == 32);
  REQUIRE(most_decode_rows({.n = 1023, .k = 1024}) == 0);
}

TEST_CASE("small weights are left to matmul") {
  REQUIRE(choose_decode({4, 512, 512, false}, 132, kShared).stages == 0);
  REQUIRE(choose_decode({2, 4096, 4096, false}, 132, kShared).source == DecodeSource::kQuantized);
  REQUIRE(choose_decode({4, 4096, 4096, false}, 132, kShared).source == DecodeSource::kStreamed);
  REQUIRE(choose_decode({64, 4096, 4096, false}, 132, kShared).source == DecodeSource::kStreamed);
}

TEST_CASE("the printed plan of a decode") {
  DecodeArgs args{.m = 2, .n = 4096, .k = 4096};
  const std::string line =
      decode_line(args, 0, choose_decode({2, 4096, 4096, false}, 132, kShared));
  REQUIRE(line.find("fp8 plan: cuda:0 decode m=2 n=4096 k=4096 x=bfloat16 rowwise | tile_rows=32 "
                    "tiles=128 stages=") == 0);
  REQUIRE(line.find(" x=quantized launches=1") != std::string::npos);
}
