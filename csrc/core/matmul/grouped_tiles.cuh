// Which tile comes next, for a kernel over groups whose extents only the device knows: tiles are
// numbered through all groups, and each block takes every so-manieth.
//
// Within a group, tiles follow each other down a band of kBandTiles tiles, then to the right: the
// blocks that run at a time share few rows of either operand, which L2 then keeps.
#pragma once

#include "core/matmul/grouped_params.h"

namespace fp8::core::grouped {

struct Tile {
  int group;
  int a_row;    // of operand a
  int out_row;  // within the output of the group, or of all where groups are rows
  int rows;     // from there on to the group's end: more than the tile may have
  int col;
  int begin_k;
  int k;
};

inline constexpr int kBandTiles = 8;

__device__ __forceinline__ int tiles_of(int extent, int tile) { return (extent + tile - 1) / tile; }

// Called by a whole warp.
template <int kM, int kN, bool kColumns>
class TileWalk {
 public:
  __device__ __forceinline__ explicit TileWalk(const TileGrid& grid)
      : grid_(grid), col_tiles_(tiles_of(grid.cols, kN)) {
    if constexpr (!kColumns) look_at(0);
  }

  // index: never less than the last one. False behind the last tile.
  __device__ __forceinline__ bool find(int index, Tile& tile) {
    if constexpr (kColumns) {
      const int row_tiles = tiles_of(grid_.rows, kM);
      const int each = row_tiles * col_tiles_;
      tile.group = index / each;
      if (tile.group >= grid_.groups) return false;
      tile.begin_k = end_of(tile.group - 1);
      tile.k = max(end_of(tile.group) - tile.begin_k, 0);
      place(index - tile.group * each, row_tiles, tile);
      tile.a_row = tile.out_row;
      tile.rows = grid_.rows - tile.out_row;
      return true;
    } else {
      while (index >= __shfl_sync(kAll, last_, 31)) {
        if (first_group_ + 32 >= grid_.groups) return false;
        look_at(first_group_ + 32);
      }
      const int lane = __ffs(__ballot_sync(kAll, index < last_)) - 1;
      const int rows = __shfl_sync(kAll, rows_, lane);
      const int begin = __shfl_sync(kAll, begin_, lane);
      const int row_tiles = tiles_of(rows, kM);
      tile.group = first_group_ + lane;
      place(index - (__shfl_sync(kAll, last_, lane) - row_tiles * col_tiles_), row_tiles, tile);
      tile.rows = rows - tile.out_row;
      tile.out_row += begin;
      tile.a_row = tile.out_row;
      tile.begin_k = 0;
      tile.k = grid_.k;
      return true;
    }
  }

 private:
  static constexpr unsigned kAll = 0xFFFFFFFFU;

  __device__ __forceinline__ int end_of(int group) const {
    if (group < 0) return 0;
    if (grid_.offsets == nullptr) return grid_.limit;  // one group
    return min(max(__ldg(grid_.offsets + group), 0), grid_.limit);
  }

  // 32 groups, one a lane.
  __device__ __forceinline__ void look_at(int first) {
    const int before = first == 0 ? 0 : __shfl_sync(kAll, last_, 31);
    const int group = first + static_cast<int>(threadIdx.x) % 32;
    first_group_ = first;
    begin_ = group < grid_.groups ? end_of(group - 1) : 0;
    rows_ = group < grid_.groups ? max(end_of(group) - begin_, 0) : 0;
    last_ = tiles_of(rows_, kM) * col_tiles_;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(kAll, last_, offset);
      if (static_cast<int>(threadIdx.x) % 32 >= offset) last_ += other;
    }
    last_ += before;
  }

  __device__ __forceinline__ void place(int index, int row_tiles, Tile& tile) const {
    const int in_band = kBandTiles * col_tiles_;
    const int band = index / in_band;
    const int height = min(row_tiles - band * kBandTiles, kBandTiles);
    const int rest = index - band * in_band;
    const int col = rest / height;
    tile.out_row = (band * kBandTiles + rest - col * height) * kM;
    tile.col = col * kN;
  }

  const TileGrid& grid_;
  int col_tiles_;
  // Of the 32 groups in sight: a lane's rows, and the tiles up to its end.
  int first_group_ = 0;
  int begin_ = 0;
  int rows_ = 0;
  int last_ = 0;
};

}  // namespace fp8::core::grouped
