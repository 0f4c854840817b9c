// Norms: every column of a row has one place among its threads, and rows are shared out once.
#include <catch2/catch.hpp>
#include <vector>

#include "host/norm.h"

using namespace fp8::core;

TEST_CASE("a row's threads hold all of its columns") {
  for (const int64_t cols : {1, 8, 9, 64, 128, 1000, 4096, 5120, 16384, 16385, 1 << 20}) {
    for (const int vectors : {2, 4}) {
      const NormPlan plan = plan_norm(cols, vectors);
      INFO("cols=" << cols << " vectors=" << vectors);
      const int64_t held = int64_t{8} * vectors * plan.threads_per_row;
      REQUIRE(held * plan.iterations >= cols);
      REQUIRE(held * (plan.iterations - 1) < cols);
      REQUIRE((plan.threads_per_row & (plan.threads_per_row - 1)) == 0);
      REQUIRE(plan.threads_per_row <= kMaxRowThreads);
      if (plan.iterations > 1) REQUIRE(plan.threads_per_row == kMaxRowThreads);
    }
  }
  REQUIRE(plan_norm(16384).iterations == 1);
  REQUIRE(plan_norm(128).threads_per_row == 4);
}

TEST_CASE("in the backward rows of up to 32 eights have few threads and the order of many") {
  for (const NormForm form : {NormForm::kScaleThenRound, NormForm::kLayer}) {
    for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat32}) {
      const int vectors = norm_backward_vectors(form == NormForm::kLayer, dtype);
      for (const int64_t cols : {1, 8, 37, 128, 200, 256, 257, 512, 1000}) {
        const NormPlan plan =
            plan_norm_backward({.form = form, .dtype = dtype, .rows = 1, .cols = cols});
        INFO("cols=" << cols << " vectors=" << vectors);
        REQUIRE(plan.pairs == (cols <= 256));
        REQUIRE(int64_t{8} * vectors * plan.threads_per_row >= cols);
        // As a thread for each eight: these are no more than the lanes of a warp.
        if (plan.pairs) REQUIRE(vectors * plan.threads_per_row <= 32);
        if (!plan.pairs) REQUIRE(plan.threads_per_row >= 32);
      }
    }
  }
  REQUIRE(plan_norm_backward({.rows = 1, .cols = 128}).threads_per_row == 4);
}

TEST_CASE("a divisor divides") {
  for (const uint32_t by : {1U, 2U, 3U, 7U, 32U, 641U, 4096U, 65537U, (1U << 30) - 1, 1U << 30}) {
    const fp8::Divisor divisor(by);
    for (const uint32_t number : {0U, 1U, by - 1, by, by + 1, 12345U, 3 * by - 1, 3 * by,
                                  (1U << 30) - 1, 1U << 30, (1U << 31) - 1}) {
      if (number > 0x7FFFFFFFU) continue;
      INFO(number << " / " << by);
      REQUIRE(divisor.quotient(number) == number / by);
    }
  }
}

TEST_CASE("the backward's slots take every row once") {
  for (const int64_t cols : {1, 128, 4096, 16384, 20000}) {
    for (const int64_t rows : {1, 5, 527, 8192, 100001}) {
      const NormPlan plan = plan_norm_backward({.rows = rows, .cols = cols});
      const NormParts parts = plan_norm_parts(plan, rows, kNormSms);
      INFO("cols=" << cols << " rows=" << rows);
      REQUIRE(parts.parts <= kNormSms);
      std::vector<int> taken(rows, 0);
      for (int64_t slot = 0; slot < parts.parts * parts.slots; ++slot) {
        for (int64_t row = slot; row < rows; row += parts.parts * parts.slots) ++taken[row];
      }
      REQUIRE(taken == std::vector<int>(rows, 1));
      // No block without a row: its partial result would be added for nothing.
      REQUIRE((parts.parts - 1) * parts.slots < rows);
    }
  }
}
