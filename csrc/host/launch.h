// Launch arithmetic: pure functions of the problem and the number of multiprocessors, tested
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fp8::core {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// FP8 matmuls contract over multiples of 16 elements; padded buffers use this for rows and columns
// alike.
constexpr int64_t kPad = 16;
constexpr int64_t pad16(int64_t extent) { return round_up(extent, kPad); }

// Extent of a scaling block, and scales in a row of 128x128 blocks: cuBLASLt wants rows of
// multiples of four of them, and silently gives wrong results otherwise.
constexpr int64_t kScaleBlock = 128;
constexpr int64_t blocks_of(int64_t extent) { return ceil_div(extent, kScaleBlock); }
constexpr int64_t square_scale_ld(int64_t cols) { return round_up(blocks_of(cols), 4); }

// --- statistics pass: blocks of 8 warps; a warp reads 1024 columns of a row at a time ---

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kStatisticsCols = 1024;

// Thread block clusters (sm_90 and later) of this many blocks are possible everywhere.
constexpr int kMaxCluster = 8;

struct StatisticsPlan {
  // Extents that the kernel walks. A contiguous matrix without results per axis is folded into rows
  // of kStatisticsCols elements, of which the last may be shorter.
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;
  int64_t last_row_cols = 0;
  int64_t col_tiles = 0;
  int64_t row_chunks = 0;
  int64_t rows_per_chunk = 0;
  // A cluster of cluster_x column tiles by cluster_y row chunks joins its results before it writes.
  int cluster_x = 1;
  int cluster_y = 1;
  int64_t row_parts = 0;  // partial results per row, ceil(col_tiles / cluster_x)
  int64_t col_parts = 0;  // and per column, ceil(row_chunks / cluster_y)
};

constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kMaxRowsPerChunk = 1024;  // rows whose amax a block keeps in shared memory
constexpr int64_t kMaxRowsPerAxisPass = kMaxGridY * kMaxRowsPerChunk;

// What a pass keeps beside the tensor's amax.
struct StatisticsAxes {
  bool rows = false;
  bool cols = false;
};

// max_cluster: kMaxCluster, or 1 where the device has no clusters.
inline StatisticsPlan plan_statistics(int64_t rows, int64_t cols, int64_t ld, StatisticsAxes axes,
                                      int sm_count, int max_cluster) {
  const bool per_axis = axes.rows || axes.cols;
  StatisticsPlan plan{.rows = rows, .cols = cols, .ld = ld, .last_row_cols = cols};
  if (!per_axis && ld == cols) {
    const int64_t count = rows * cols;
    plan.cols = std::min(count, kStatisticsCols);
    plan.rows = ceil_div(count, plan.cols);
    plan.ld = plan.cols;
    plan.last_row_cols = count - (plan.rows - 1) * plan.cols;
  }
  plan.col_tiles = ceil_div(plan.cols, kStatisticsCols);
  // Per axis a block needs more registers, and each chunk costs the cast pass a partial result.
  const int64_t blocks = static_cast<int64_t>(sm_count) * (per_axis ? 2 : 16);
  const int64_t wanted =
      std::clamp<int64_t>(blocks / plan.col_tiles, 1, ceil_div(plan.rows, kWarps));
  plan.rows_per_chunk = round_up(ceil_div(plan.rows, wanted), kWarps);
  if (axes.rows) plan.rows_per_chunk = std::min(plan.rows_per_chunk, kMaxRowsPerChunk);
  plan.row_chunks = ceil_div(plan.rows, plan.rows_per_chunk);

  // The cluster that leaves a cast tile of 128 rows by 64 columns the fewest partial results.
  int64_t fewest = 0;
  for (int x = 1; x <= max_cluster && x <= plan.col_tiles; x *= 2) {
    for (int y = 1; x * y <= max_cluster && y <= plan.row_chunks; y *= 2) {
      const int64_t row_parts = ceil_div(plan.col_tiles, x);
      const int64_t col_parts = ceil_div(plan.row_chunks, y);
      const int64_t reads = (axes.rows ? 2 * row_parts : 0) + (axes.cols ? col_parts : 0);
      if (plan.row_parts != 0 && reads >= fewest) continue;
      fewest = reads;
      plan.cluster_x = x;
      plan.cluster_y = y;
      plan.row_parts = row_parts;
      plan.col_parts = col_parts;
    }
  }
  return plan;
}

// --- cast pass: 128 x 64 tiles, a block casts `tiles_per_block` of them one below the other ---

constexpr int64_t kTileRows = 128;
constexpr int64_t kTileCols = 64;
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;  // more tiles than fit in any memory

struct CastPlan {
  int64_t col_tiles = 0;
  int64_t row_tiles = 0;
  int64_t tiles_per_block = 0;
  int64_t strips = 0;  // blocks along the rows; col_tiles * strips blocks in all
};

// rows, cols: the larger of the matrix's and its destinations' padded extents. `per_axis` blocks
// read partial results for each of their rows and columns, which a taller strip spreads over more
// tiles.
inline CastPlan plan_cast(int64_t rows, int64_t cols, bool per_axis, int sm_count) {
  CastPlan plan;
  plan.col_tiles = ceil_div(cols, kTileCols);
  plan.row_tiles = ceil_div(rows, kTileRows);
  const int64_t cooperative = static_cast<int64_t>(sm_count) * 4;
  const int64_t tiles = plan.col_tiles * plan.row_tiles;
  plan.tiles_per_block = per_axis ? std::clamp<int64_t>(tiles / cooperative, 1, 4) : 1;
  plan.strips = ceil_div(plan.row_tiles, plan.tiles_per_block);
  return plan;
}

// --- both passes of a tensor's own scale in one launch: tiles of the cast pass, every blocks-th
// for a block ---

constexpr int kCooperativeBlocks = 2;  // on a multiprocessor

// Where one launch is faster than two (H200, bf16): 1 us slower at 1 MB, 5 to 20% faster from 16 to
// 117 MB, not faster at 235 MB, most of which must be read twice all the same. Per row and column
// 13 to 30% faster from 16 to 67 MB, 1 to 5% at 117 and 134 MB.
constexpr int64_t kMinCooperativeBytes = int64_t{8} << 20;
constexpr int64_t kMaxCooperativeBytes = int64_t{128} << 20;

struct CooperativePlan {
  unsigned col_tiles = 0;
  unsigned tiles = 0;
  unsigned blocks = 0;           // 0: two launches
  unsigned tiles_per_block = 0;  // with a scale for each row and column: one below the other
};

// rows, cols: as for plan_cast. A tile at an edge counts as a whole one.
inline CooperativePlan plan_cooperative(int64_t rows, int64_t cols, int64_t element_bytes,
                                        int sm_count) {
  const int64_t col_tiles = ceil_div(cols, kTileCols);
  const int64_t tiles = col_tiles * ceil_div(rows, kTileRows);
  const int64_t bytes = tiles * kTileRows * kTileCols * element_bytes;
  if (bytes < kMinCooperativeBytes || bytes > kMaxCooperativeBytes) return {};
  const int64_t blocks =
      std::min<int64_t>(tiles, static_cast<int64_t>(sm_count) * kCooperativeBlocks);
  return {.col_tiles = static_cast<unsigned>(col_tiles),
          .tiles = static_cast<unsigned>(tiles),
          .blocks = static_cast<unsigned>(blocks)};
}

// The same with a scale for each row and column: a block's tiles lie one below the other, so that
// it joins the maxima of its columns by itself. None where the tiles fill the GPU badly.
inline CooperativePlan plan_cooperative_per_axis(int64_t rows, int64_t cols, int64_t element_bytes,
                                                 int sm_count) {
  CooperativePlan plan = plan_cooperative(rows, cols, element_bytes, sm_count);
  if (plan.blocks == 0) return plan;
  const unsigned room = static_cast<unsigned>(sm_count) * kCooperativeBlocks;
  const unsigned row_tiles = plan.tiles / plan.col_tiles;
  if (plan.col_tiles > room) return {};
  plan.tiles_per_block = (row_tiles + room / plan.col_tiles - 1) / (room / plan.col_tiles);
  plan.blocks = plan.col_tiles * ((row_tiles + plan.tiles_per_block - 1) / plan.tiles_per_block);
  const bool fills = uint64_t{plan.tiles} * 4 >= uint64_t{room} * plan.tiles_per_block * 3;
  return fills ? plan : CooperativePlan{};
}

// --- blockwise pass: a block of threads casts one tile of 128 x 128, both ways ---

struct BlockwisePlan {
  int64_t col_tiles = 0;
  int64_t row_tiles = 0;
  // Rows of 128x128 scales: of data and of data_t
  int64_t scale_cols = 0;
  int64_t scale_ld = 0;
  int64_t scale_t_cols = 0;
  int64_t scale_t_ld = 0;
};

// rows, cols: as for plan_cast. Tiles beyond the matrix write padding.
inline BlockwisePlan plan_blockwise(int64_t rows, int64_t cols, int64_t data_ld,
                                    int64_t data_t_ld) {
  return {.col_tiles = blocks_of(cols),
          .row_tiles = blocks_of(rows),
          .scale_cols = blocks_of(data_ld),
          .scale_ld = square_scale_ld(data_ld),
          .scale_t_cols = blocks_of(data_t_ld),
          .scale_t_ld = square_scale_ld(data_t_ld)};
}

// --- passes over rows: threads_per_row threads hold a row in registers, 8 elements a vector ---

struct RowwisePlan {
  int threads_per_row = 32;
  int rows_per_block = 8;
  int vectors_per_thread = 1;  // 1, 2, 4 or 8
  int iterations = 1;          // > 1: the row does not fit and is read twice
};

constexpr int kMaxRowVectors = 8;
constexpr int kMaxRowThreads = 512;

// block_threads: of a block of short rows; a row that needs more threads has a block to itself.
// max_vectors: that a thread has registers for.
inline RowwisePlan plan_rowwise(int64_t padded_cols, int block_threads = kThreads,
                                int max_vectors = kMaxRowVectors) {
  RowwisePlan plan;
  const int64_t vectors = ceil_div(padded_cols, 8);
  while (plan.threads_per_row < kMaxRowThreads &&
         vectors > static_cast<int64_t>(max_vectors) * plan.threads_per_row)
    plan.threads_per_row *= 2;
  while (plan.vectors_per_thread < max_vectors &&
         vectors > static_cast<int64_t>(plan.vectors_per_thread) * plan.threads_per_row) {
    plan.vectors_per_thread *= 2;
  }
  plan.rows_per_block = std::max(1, block_threads / plan.threads_per_row);
  plan.iterations = static_cast<int>(
      ceil_div(vectors, static_cast<int64_t>(plan.vectors_per_thread) * plan.threads_per_row));
  return plan;
}

// With the maxima of columns too: a block keeps those of the rows that it takes one after the
// other, all of one group, in registers.
struct ColumnAmaxPlan {
  RowwisePlan row;
  int64_t rows_per_block = 0;  // a multiple of row.rows_per_block
  int64_t blocks_per_group = 0;
};

constexpr int kMaxColumnAmaxVectors = 4;
constexpr int kColumnAmaxSlots = 3;  // rows in shared memory: of 99 KB, the least that GPUs have
constexpr int64_t kMaxColumnAmaxRowBytes = int64_t{32} << 10;

// rows: of all groups. Some four thousand threads to a multiprocessor, several times what it holds
// at once, so that blocks end at different times.
inline ColumnAmaxPlan plan_column_amax(int64_t rows, int64_t group_rows, int64_t cols,
                                       int block_threads, int sm_count) {
  ColumnAmaxPlan plan{.row = plan_rowwise(cols, block_threads, kMaxColumnAmaxVectors)};
  const int64_t threads = int64_t{plan.row.threads_per_row} * plan.row.rows_per_block;
  const int64_t wanted = ceil_div(rows, sm_count * (4096 / threads));
  plan.rows_per_block =
      round_up(std::clamp<int64_t>(wanted, 16, 256), int64_t{plan.row.rows_per_block});
  plan.blocks_per_group = ceil_div(group_rows, plan.rows_per_block);
  return plan;
}

}  // namespace fp8::core
