// How core::decode shares a product of few rows among the multiprocessors, and what
// FP8_PRINT_PLAN=1 says of it. Host logic: no CUDA, tested on any machine.
//
//   fp8 plan: cuda:0 decode m=2 n=4096 k=4096 x=bfloat16 rowwise | tile_rows=32 tiles=128 stages=20
//   x=quantized launches=1
//
// A block owns whole rows of the weight, a tile of them at a time, so that no block waits for
// another. It streams them through a ring of stages in shared memory, of kDecodeStageCols columns
// each; four warpgroups take stages in turn, and add their sums once for each tile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "fp8/core_decode.h"
#include "host/formats.h"
#include "host/launch.h"
#include "host/print_plan.h"

namespace fp8::core {

constexpr int kDecodeGroups = 4;                          // warpgroups that multiply
constexpr int kDecodeThreads = kDecodeGroups * 128 + 32;  // and a warp that copies
constexpr int kDecodeBoxCols = 128;  // bytes of a row that the copy engine swizzles
constexpr int kDecodeStageCols = 2 * kDecodeBoxCols;
constexpr int kDecodeBoxAlign = 1024;
constexpr int kMmaTileRows = 64;  // what the instruction takes; rows beyond a tile's are not used
constexpr int kDecodeMaxStages = 40;  // a multiple of kDecodeGroups, as each number of stages is:
                                      // then a slot of the ring has one reader, which cannot take
                                      // what the slot held before for what it waits for

// How a block gets the codes of x.
enum class DecodeSource : uint8_t {
  kQuantized,  // makes them itself, of all of x, once
  kStreamed,   // copies them with each stage
};

struct DecodePlan {
  int tokens = 0;  // rows of x, rounded up to what the instructions take: 8, 16, 32 or 64
  int tile_rows = 0;
  int64_t tiles = 0;
  int blocks = 0;       // one a multiprocessor; block b takes tiles b, b + blocks, ...
  int64_t k_boxes = 0;  // an even number: zeros fill the last stage
  DecodeSource source = DecodeSource::kQuantized;
  int stages = 0;
  int stage_bytes = 0;
  // Offsets in shared memory, after the stages.
  int x_offset = 0;
  int sums_offset = 0;  // [groups][tokens][sums_pitch] floats
  int sums_pitch = 0;
  int scales_offset = 0;    // of x, where the block makes them: [1 or k_boxes][tokens]
  int barriers_offset = 0;  // full and free for each stage, 8 bytes each
  int amax_offset = 0;      // [tokens] words, behind them
  int shared_bytes = 0;

  bool operator==(const DecodePlan&) const = default;
};

// Rows of a tile, a multiple of 8, at most `most`: those for which the busiest multiprocessor has
// the fewest rows, of those the largest.
constexpr int decode_tile_rows(int64_t n, int sm_count, int most) {
  int best = most;
  int64_t best_rows = INT64_MAX;
  for (int rows = most; rows >= 16; rows -= 8) {
    const int64_t busiest = ceil_div(ceil_div(n, rows), sm_count) * rows;
    if (busiest < best_rows) {
      best = rows;
      best_rows = busiest;
    }
  }
  return best;
}

constexpr int decode_tokens(int64_t m) { return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64; }

// stages == 0: it does not fit.
inline DecodePlan plan_decode(int64_t m, int64_t n, int64_t k, bool blocks, DecodeSource source,
                              int most_rows, int sm_count, int shared_bytes) {
  DecodePlan plan{.tokens = decode_tokens(m),
                  .tile_rows = decode_tile_rows(n, sm_count, most_rows),
                  .k_boxes = round_up(ceil_div(k, kDecodeBoxCols), 2),
                  .source = source};
  plan.tiles = ceil_div(n, plan.tile_rows);
  // Threads write 8 rows and 4 pairs of tokens at a time: so they meet no bank twice.
  plan.sums_pitch = plan.tile_rows + 4;
  plan.blocks = static_cast<int>(std::min<int64_t>(plan.tiles, sm_count));
  const bool streams_x = source == DecodeSource::kStreamed;
  plan.stage_bytes = (plan.tile_rows + (streams_x ? plan.tokens : 0)) * kDecodeStageCols;
  const int64_t x_bytes = streams_x ? 0 : plan.k_boxes * plan.tokens * kDecodeBoxCols;
  const int64_t sums = int64_t{kDecodeGroups} * plan.tokens * plan.sums_pitch * 4;
  const bool makes_scales = source == DecodeSource::kQuantized;
  const int64_t scales = makes_scales ? (blocks ? plan.k_boxes : 1) * plan.tokens * 4 : 0;
  // The instructions read whole tiles of kMmaTileRows rows, of the last box too.
  const int beyond = static_cast<int>(round_up(plan.tile_rows, kMmaTileRows)) - plan.tile_rows;
  for (int stages = kDecodeMaxStages; stages > 0; stages -= kDecodeGroups) {
    const int64_t x_offset = int64_t{stages} * plan.stage_bytes;
    const int64_t sums_offset = x_offset + x_bytes;
    const int64_t scales_offset = sums_offset + sums;
    const int64_t barriers_offset = scales_offset + scales;
    const int64_t amax_offset = barriers_offset + 2 * stages * 8;
    const int64_t end = std::max(amax_offset + plan.tokens * 4,
                                 x_offset - (streams_x ? plan.tokens * kDecodeStageCols : 0) +
                                     int64_t{beyond} * kDecodeBoxCols);
    if (end > shared_bytes) continue;
    plan.stages = stages;
    plan.x_offset = static_cast<int>(x_offset);
    plan.sums_offset = static_cast<int>(sums_offset);
    plan.scales_offset = static_cast<int>(scales_offset);
    plan.barriers_offset = static_cast<int>(barriers_offset);
    plan.amax_offset = static_cast<int>(amax_offset);
    plan.shared_bytes = static_cast<int>(end);
    break;
  }
  return plan;
}

struct DecodeProblem {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  bool blocks = false;     // scales of x and of the weight are of blocks
  bool one_scale = false;  // x has one, and the weight has one
};

// Elements of x that a block quantizes for itself: of more that takes longer than the launch that
// is saved. At most 8 rows.
constexpr int64_t kDecodeQuantizedElements = 14336;
// Of less the launch is the time, whichever way the product is made.
constexpr int64_t kDecodeLeastWeight = int64_t{1} << 20;
// Of more in blocks, cuBLASLt's product is faster than 64 tokens, which are taken from 33 rows on.
constexpr int64_t kDecodeMostBlocks = int64_t{1} << 25;

// Rows up to which decode is the faster one, 0 if at none: so up to there a row has the same bits
// for every m. cuBLASLt's product with one scale for each operand is its fastest.
constexpr int64_t most_decode_rows(const DecodeProblem& problem) {
  const int64_t weight = problem.n * problem.k;
  if (weight < kDecodeLeastWeight) return 0;
  return problem.one_scale || (problem.blocks && weight > kDecodeMostBlocks) ? 32 : kMaxDecodeRows;
}

// stages == 0: decode does not take it.
inline DecodePlan choose_decode(const DecodeProblem& problem, int sm_count, int shared_bytes) {
  const auto& [m, n, k, blocks, one_scale] = problem;
  if (m < 1 || m > most_decode_rows(problem)) return {};
  const auto fits = [&](DecodeSource source) {
    return plan_decode(m, n, k, blocks, source, kMmaTileRows, sm_count, shared_bytes);
  };
  DecodePlan plan;
  if (m <= 8 && m * k <= kDecodeQuantizedElements) plan = fits(DecodeSource::kQuantized);
  if (plan.stages == 0) plan = fits(DecodeSource::kStreamed);
  return plan;
}

inline std::string decode_line(const DecodeArgs& args, int device, const DecodePlan& plan) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  return "fp8 plan: " + device_text(device) + " decode m=" + number(args.m) +
         " n=" + number(args.n) + " k=" + number(args.k) + " x=" + dtype_name(args.x_dtype) + " " +
         granularity_name(args.granularity) + (args.power_of_two ? " power_of_two" : "") +
         (args.bias != nullptr ? " bias" : "") + " | tile_rows=" + number(plan.tile_rows) +
         " tiles=" + number(plan.tiles) + " stages=" + number(plan.stages) +
         (plan.source == DecodeSource::kQuantized ? " x=quantized launches=1"
                                                  : " x=streamed launches=2");
}

}  // namespace fp8::core
