// Launch arithmetic: every element is covered once, and the limits that kernels rely on hold.
#include <catch2/catch.hpp>
#include <utility>

#include "host/launch.h"

using namespace fp8::core;

TEST_CASE("the statistics pass covers each row and column once") {
  for (const int64_t rows : {1, 7, 8, 9, 1000, 8192, 1 << 20}) {
    for (const int64_t cols : {1, 8, 1023, 1024, 1025, 14336}) {
      for (const bool per_axis : {false, true}) {
        for (const bool contiguous : {false, true}) {
          const StatisticsPlan plan =
              plan_statistics(rows, cols, contiguous ? cols : cols + 3,
                              {.rows = per_axis, .cols = per_axis}, 132, kMaxCluster);
          INFO("rows=" << rows << " cols=" << cols << " per_axis=" << per_axis);
          REQUIRE((plan.rows - 1) * plan.cols + plan.last_row_cols == rows * cols);
          REQUIRE(plan.last_row_cols >= 1);
          REQUIRE(plan.last_row_cols <= plan.cols);
          REQUIRE(plan.col_tiles * kStatisticsCols >= plan.cols);
          REQUIRE(plan.row_chunks * plan.rows_per_chunk >= plan.rows);
          REQUIRE((plan.row_chunks - 1) * plan.rows_per_chunk < plan.rows);
          REQUIRE(plan.rows_per_chunk % kWarps == 0);
          REQUIRE(plan.cluster_x * plan.cluster_y <= kMaxCluster);
          REQUIRE(plan.row_parts * plan.cluster_x >= plan.col_tiles);
          REQUIRE(plan.col_parts * plan.cluster_y >= plan.row_chunks);
          if (per_axis) REQUIRE(plan.rows_per_chunk <= 1024);
          if (per_axis || !contiguous) {
            REQUIRE(plan.rows == rows);
            REQUIRE(plan.cols == cols);
          }
        }
      }
    }
  }
}

TEST_CASE("a large contiguous tensor keeps the number of partial maxima small") {
  const StatisticsPlan plan = plan_statistics(8192, 14336, 14336, {}, 132, kMaxCluster);
  REQUIRE(plan.row_chunks * plan.col_tiles <= 132 * 16);
  REQUIRE(plan.row_chunks * plan.col_tiles >= 132);
}

TEST_CASE("clusters leave few partial results") {
  const StatisticsPlan both = plan_statistics(8192, 4096, 4096, {true, true}, 132, kMaxCluster);
  const StatisticsPlan alone = plan_statistics(8192, 4096, 4096, {true, true}, 132, 1);
  REQUIRE(alone.cluster_x * alone.cluster_y == 1);
  REQUIRE(both.cluster_x * both.cluster_y == kMaxCluster);
  REQUIRE(2 * both.row_parts + both.col_parts < 2 * alone.row_parts + alone.col_parts);
}

TEST_CASE("the cast pass covers every tile within the grid's limits") {
  for (const int64_t rows : {int64_t{16}, int64_t{128}, int64_t{8192}, int64_t{1} << 30}) {
    for (const int64_t cols : {16, 64, 80, 14336}) {
      for (const bool per_axis : {false, true}) {
        const CastPlan plan = plan_cast(rows, cols, per_axis, 132);
        REQUIRE(plan.row_tiles * kTileRows >= rows);
        REQUIRE(plan.col_tiles * kTileCols >= cols);
        REQUIRE(plan.strips * plan.tiles_per_block >= plan.row_tiles);
        REQUIRE((plan.strips - 1) * plan.tiles_per_block < plan.row_tiles);
        REQUIRE((per_axis || plan.tiles_per_block == 1));
        REQUIRE(plan.strips * plan.col_tiles <= kMaxGridX);
      }
    }
  }
}

TEST_CASE("both passes are one launch for matrices of 8 to 128 MB") {
  const auto blocks = [](int64_t rows, int64_t cols, int64_t bytes) {
    const CooperativePlan plan = plan_cooperative(rows, cols, bytes, 132);
    REQUIRE((plan.blocks == 0 || plan.col_tiles * 64 >= cols));
    REQUIRE((plan.blocks == 0 || plan.tiles == plan.col_tiles * ceil_div(rows, kTileRows)));
    return plan.blocks;
  };
  REQUIRE(blocks(2048, 2048, 2) == 2 * 132);
  REQUIRE(blocks(2048, 1984, 2) == 0);
  REQUIRE(blocks(2048, 1024, 4) == 256);  // not more blocks than tiles
  REQUIRE(blocks(16384, 4096, 2) == 2 * 132);
  REQUIRE(blocks(16384, 4160, 2) == 0);
  REQUIRE(blocks(1 << 21, 8, 2) == 0);  // 32 MB in tiles that hold 256
  REQUIRE(blocks(int64_t{1} << 40, int64_t{1} << 20, 4) == 0);
}

TEST_CASE("per row and column, one launch's tiles lie one below the other and fill the GPU") {
  const auto plan_of = [](int64_t rows, int64_t cols, int64_t bytes) {
    const CooperativePlan plan = plan_cooperative_per_axis(rows, cols, bytes, 132);
    if (plan.blocks == 0) return plan;
    const unsigned strips = plan.blocks / plan.col_tiles;
    const unsigned row_tiles = plan.tiles / plan.col_tiles;
    REQUIRE(plan.blocks == strips * plan.col_tiles);
    REQUIRE(plan.blocks <= 2 * 132);
    REQUIRE(strips * plan.tiles_per_block >= row_tiles);
    REQUIRE((strips - 1) * plan.tiles_per_block < row_tiles);
    return plan;
  };
  REQUIRE(plan_of(8192, 4096, 2).blocks == 256);
  REQUIRE(plan_of(8192, 4096, 2).tiles_per_block == 16);
  REQUIRE(plan_of(4096, 14336, 2).blocks == 224);  // one strip, 32 tiles high
  REQUIRE(plan_of(2500, 2072, 2).blocks == 231);   // the last strip is shorter
  REQUIRE(plan_of(129, 16500, 4).blocks == 258);
  REQUIRE(plan_of(1500, 1500, 4).blocks == 0);   // 288 tiles, two a block: 144 of 264 blocks
  REQUIRE(plan_of(41, 110000, 2).blocks == 0);   // more columns of tiles than blocks
  REQUIRE(plan_of(16384, 4160, 2).blocks == 0);  // as for one scale
  REQUIRE(plan_of(1024, 1024, 2).blocks == 0);
}

TEST_CASE("the rowwise pass holds a row in registers, or reads it again") {
  for (const int64_t cols : {16, 256, 1024, 4096, 14336, 32768, 32784, 1 << 20}) {
    const RowwisePlan plan = plan_rowwise(cols);
    INFO("cols=" << cols);
    REQUIRE(static_cast<int64_t>(plan.threads_per_row) * plan.vectors_per_thread * plan.iterations *
                8 >=
            cols);
    REQUIRE(plan.threads_per_row * plan.rows_per_block <= 512);
    REQUIRE((plan.iterations == 1) == (cols <= 32768));
  }
}

TEST_CASE("with maxima of columns a block has rows of one group, and a row in registers") {
  for (const int64_t cols : {16, 768, 2048, 4096, 14336, 16384}) {
    for (const int64_t group_rows : {int64_t{16}, int64_t{1536}, int64_t{28672}}) {
      const int64_t rows = 8 * group_rows;
      const ColumnAmaxPlan plan = plan_column_amax(rows, group_rows, cols, 128, 132);
      INFO("cols=" << cols << " group_rows=" << group_rows);
      REQUIRE(plan.row.iterations == 1);
      REQUIRE(plan.row.vectors_per_thread <= kMaxColumnAmaxVectors);
      REQUIRE(plan.rows_per_block % plan.row.rows_per_block == 0);
      REQUIRE(plan.rows_per_block * plan.blocks_per_group >= group_rows);
      REQUIRE(plan.rows_per_block * (plan.blocks_per_group - 1) < group_rows);
      REQUIRE(plan.rows_per_block <= 256);
    }
  }
  REQUIRE(plan_column_amax(229376, 28672, 4096, 128, 132).rows_per_block == 55);
  REQUIRE(plan_column_amax(32768, 4096, 14336, 128, 132).rows_per_block == 32);
}

TEST_CASE("the blockwise pass covers every tile and every scale") {
  for (const int64_t rows : {int64_t{1}, int64_t{128}, int64_t{129}, int64_t{8200}}) {
    for (const int64_t cols : {1, 128, 130, 513, 14336}) {
      const BlockwisePlan plan = plan_blockwise(pad16(rows), pad16(cols), pad16(cols), pad16(rows));
      INFO("rows=" << rows << " cols=" << cols);
      REQUIRE(plan.row_tiles == blocks_of(rows));
      REQUIRE(plan.col_tiles == blocks_of(cols));
      REQUIRE(plan.row_tiles * kScaleBlock >= pad16(rows));
      REQUIRE(plan.col_tiles * kScaleBlock >= pad16(cols));
      REQUIRE(plan.scale_cols == plan.col_tiles);
      REQUIRE(plan.scale_t_cols == plan.row_tiles);
      for (const auto& [cols_of, ld] :
           {std::pair(plan.scale_cols, plan.scale_ld), {plan.scale_t_cols, plan.scale_t_ld}}) {
        REQUIRE(ld % 4 == 0);
        REQUIRE(ld >= cols_of);
        REQUIRE(ld < cols_of + 4);
      }
    }
  }
}

TEST_CASE("padding rounds up to 16") {
  REQUIRE(pad16(0) == 0);
  REQUIRE(pad16(1) == 16);
  REQUIRE(pad16(16) == 16);
  REQUIRE(pad16(17) == 32);
}
