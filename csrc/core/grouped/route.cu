// Slots sorted by expert, and groups cut into tiles: everything that the host would have to wait
// for, made on the device.
//
// A stable counting sort: blocks of 256 slots count their experts, a block per expert adds the
// counts up, and the blocks of slots find each slot's row. A warp's equal experts are found by
// match_any, the warps' counts meet in shared memory: no atomics decide an order, so the
// permutation is the same on every run. Bound by latency: three small launches.
#include "core/grouped/device.cuh"

namespace fp8::core {
namespace {

constexpr int kRouteThreads = 256;
constexpr int kRouteWarps = kRouteThreads / 32;
constexpr int kMaxBuckets = kMaxGroups + 1;  // the last one for sentinels

struct RouteParams {
  RouteArgs args;
  int64_t chunks;
  int32_t* counts;  // [buckets, chunks]; becomes the counts of the chunks before
  int32_t* totals;  // [buckets]
};

// The bucket of a slot: its expert, or the one behind the last for ids that are no expert here.
__device__ __forceinline__ int bucket_of(const RouteArgs& a, int64_t slot) {
  const int64_t expert = a.experts[slot];
  return static_cast<int>(expert >= 0 && expert < a.groups ? expert : a.groups);
}

__global__ void __launch_bounds__(kRouteThreads) count_kernel(const RouteParams p) {
  __shared__ int count[kMaxBuckets];
  const int buckets = static_cast<int>(p.args.groups) + 1;
  for (int b = threadIdx.x; b < buckets; b += kRouteThreads) count[b] = 0;
  __syncthreads();
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kRouteThreads + threadIdx.x;
  if (slot < p.args.slots) atomicAdd(&count[bucket_of(p.args, slot)], 1);
  __syncthreads();
  for (int b = threadIdx.x; b < buckets; b += kRouteThreads) {
    p.counts[b * p.chunks + blockIdx.x] = count[b];
  }
}

// A block per bucket.
__global__ void __launch_bounds__(kRouteThreads) add_up_kernel(const RouteParams p) {
  __shared__ int scratch[kRouteWarps];
  int32_t* counts = p.counts + blockIdx.x * p.chunks;
  int before = 0;
  for (int64_t begin = 0; begin < p.chunks; begin += kRouteThreads) {
    const int64_t chunk = begin + threadIdx.x;
    const int value = chunk < p.chunks ? counts[chunk] : 0;
    int total = 0;
    const int sum = exclusive_scan<kRouteThreads>(value, &total, scratch);
    if (chunk < p.chunks) counts[chunk] = before + sum;
    before += total;
  }
  if (threadIdx.x == 0) p.totals[blockIdx.x] = before;
}

__global__ void __launch_bounds__(kRouteThreads) place_kernel(const RouteParams p) {
  __shared__ int scratch[kRouteWarps];
  __shared__ int base[kMaxBuckets];
  __shared__ int warp_count[kRouteWarps][kMaxBuckets];
  const RouteArgs& a = p.args;
  const int buckets = static_cast<int>(a.groups) + 1;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  // First rows of the buckets; the first block tells where groups end.
  int before = 0;
  for (int begin = 0; begin < buckets; begin += kRouteThreads) {
    const int b = begin + static_cast<int>(threadIdx.x);
    const int value = b < buckets ? p.totals[b] : 0;
    int total = 0;
    const int sum = before + exclusive_scan<kRouteThreads>(value, &total, scratch);
    if (b < buckets) base[b] = sum;
    if (blockIdx.x == 0 && b < a.groups) a.offsets[b] = sum + value;
    before += total;
  }
  for (int i = threadIdx.x; i < kRouteWarps * buckets; i += kRouteThreads) {
    warp_count[i / buckets][i % buckets] = 0;
  }
  __syncthreads();

  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kRouteThreads + threadIdx.x;
  const bool exists = slot < a.slots;
  const int bucket = exists ? bucket_of(a, slot) : -1;
  const unsigned equal = __match_any_sync(0xFFFFFFFFU, bucket);
  const int rank = __popc(equal & ((1U << lane) - 1));
  if (exists && rank == 0) warp_count[warp][bucket] = __popc(equal);
  __syncthreads();
  if (!exists) return;
  int row = base[bucket] + p.counts[bucket * p.chunks + blockIdx.x] + rank;
  for (int w = 0; w < warp; ++w) row += warp_count[w][bucket];
  a.place[slot] = row;
  a.source[row] = static_cast<int32_t>(slot);
}

constexpr int kTableThreads = 1024;

// padded_group, which only the host may call.
__device__ __forceinline__ int padded_columns(int rows) {
  constexpr int kPadding = static_cast<int>(kGroupPad);
  return max((rows + kPadding - 1) / kPadding * kPadding, kPadding);
}

struct TableParams {
  TileTableArgs args;
  int entries;
  int columns;  // of a transposed copy
};

__global__ void __launch_bounds__(kTableThreads) tile_table_kernel(const TableParams p) {
  const TileTableArgs& a = p.args;
  __shared__ int scratch[kTableThreads / 32];
  __shared__ int first_tile[kTableThreads];
  __shared__ int first_column[kTableThreads];
  __shared__ int first_row[kTableThreads];
  __shared__ int row_count[kTableThreads];
  const int group = threadIdx.x;
  const int groups = static_cast<int>(a.groups);
  const auto row_limit = static_cast<int>(a.rows);
  int rows = 0;
  int begin = 0;
  if (group < groups) {
    begin = min(max(group == 0 ? 0 : a.offsets[group - 1], 0), row_limit);
    rows = max(min(a.offsets[group], row_limit) - begin, 0);
  }
  const int padded = group < groups ? padded_columns(rows) : 0;
  const int tiles =
      (padded + static_cast<int>(kGroupTileRows) - 1) / static_cast<int>(kGroupTileRows);
  int all_tiles = 0;
  int all_columns = 0;
  first_tile[group] = exclusive_scan<kTableThreads>(tiles, &all_tiles, scratch);
  first_column[group] = exclusive_scan<kTableThreads>(padded, &all_columns, scratch);
  first_row[group] = begin;
  row_count[group] = rows;
  if (group < groups) a.padded_offsets[group] = first_column[group] + padded;
  __syncthreads();
  for (int tile = threadIdx.x; tile < p.entries; tile += kTableThreads) {
    GroupTile entry;
    if (tile < all_tiles) {
      int low = 0;  // the last group whose first tile is at or before this one
      int high = groups - 1;
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first_tile[middle] <= tile) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      const int done = (tile - first_tile[low]) * static_cast<int>(kGroupTileRows);
      const int left = row_count[low] - done;
      const int columns = padded_columns(row_count[low]) - done;
      const auto limit = static_cast<int>(kGroupTileRows);
      entry.row = first_row[low] + done;
      entry.extents = min(left, limit) | min(columns, limit) << 8 | (done == 0 ? 1 << 16 : 0);
      entry.column = first_column[low] + done;
      entry.group = low;
    } else {
      const auto limit = static_cast<int>(kGroupTileRows);
      const int column = all_columns + (tile - all_tiles) * limit;
      if (column < p.columns) {
        entry.extents = min(p.columns - column, limit) << 8;
        entry.column = column;
        entry.group = 0;
      }
    }
    a.tiles[tile] = entry;
  }
}

int64_t chunks_of(const RouteArgs& args) { return ceil_div(args.slots, kRouteThreads); }

void check_groups(int64_t groups) {
  require(groups >= 1 && groups <= kMaxGroups, "grouped passes take 1 to 1023 groups");
}

}  // namespace

int64_t route_workspace_words(const RouteArgs& args) {
  return (args.groups + 1) * (chunks_of(args) + 1);
}

void route(const RouteArgs& args, Stream stream) {
  check_groups(args.groups);
  require(args.slots > 0 && args.slots < (int64_t{1} << 31), "route takes 1 to 2^31 - 1 slots");
  const int64_t chunks = chunks_of(args);
  const int64_t buckets = args.groups + 1;
  const RouteParams params{args, chunks, args.workspace, args.workspace + buckets * chunks};
  const auto blocks = static_cast<unsigned>(chunks);
  launch(count_kernel, blocks, kRouteThreads, stream, params);
  launch(add_up_kernel, static_cast<unsigned>(buckets), kRouteThreads, stream, params);
  launch(place_kernel, blocks, kRouteThreads, stream, params);
}

void make_tile_table(const TileTableArgs& args, Stream stream) {
  check_groups(args.groups);
  require(max_padded_rows(args.rows, args.groups) < (int64_t{1} << 31),
          "groups take fewer than 2^31 rows");
  launch(tile_table_kernel, 1, kTableThreads, stream,
         TableParams{args, static_cast<int>(max_group_tiles(args.rows, args.groups)),
                     static_cast<int>(max_padded_rows(args.rows, args.groups))});
}

}  // namespace fp8::core
