// fp8/core_grouped.h: the passes around grouped matmuls (mixture of experts), without LibTorch. The
// promises of fp8/core.h hold: no device memory is allocated, nothing synchronizes, no torch
// header.
//
// Words: rows of one expert lie together, a group; `offsets` [groups] int32 on the device has the
// row that ends each group, so rows past the last offset belong to nobody. A slot is one (token,
// choice) pair, numbered token * top_k + choice; `place` says in which row a slot lies, `source`
// which slot lies in a row. Every pass looks at `offsets` on the device: the host never knows them.
#pragma once

#include "fp8/core.h"

namespace fp8::core {

// CUTLASS' grouped matmul takes fewer than 1024 groups; every pass here counts on it.
inline constexpr int64_t kMaxGroups = 1023;

// Sorts slots by expert, stably: a counting sort in three launches. Ids outside [0, groups) go past
// the last offset (sentinels of expert parallelism).
struct RouteArgs {
  const int64_t* experts = nullptr;  // [slots]
  int64_t slots = 0;
  int64_t groups = 0;
  int32_t* offsets = nullptr;    // [groups]
  int32_t* place = nullptr;      // [slots], a permutation
  int32_t* source = nullptr;     // [slots], its inverse
  int32_t* workspace = nullptr;  // route_workspace_words(args), any content
};
int64_t route_workspace_words(const RouteArgs& args);
void route(const RouteArgs& args, Stream stream);

// Reads each row of x once and writes it `copies` times, to the rows that `place` says (to its own
// row without): quantized with a scale per row or per 128 elements of one, or as it is, or both.
struct ScatterRowsArgs {
  const void* x = nullptr;  // [rows, cols]
  Dtype x_dtype = Dtype::kBFloat16;
  int64_t rows = 0;
  int64_t cols = 0;  // multiple of 16 where data is made
  int64_t ld = 0;
  int64_t copies = 1;
  const int32_t* place = nullptr;  // [rows * copies], or nullptr with one copy
  void* data = nullptr;            // [.., cols] codes, optional
  float* scale = nullptr;          // with data: [rows * copies], or as granularity says
  void* plain = nullptr;           // [.., cols] in x's dtype, optional
  Dtype dtype = Dtype::kE4M3;      // of data
  // Of data: kRowwise, or kBlock1x128 with scales [blocks of cols, rows * copies].
  Granularity granularity = Granularity::kRowwise;
  bool power_of_two = false;
};
void scatter_rows(const ScatterRowsArgs& args, Stream stream);

// Columns of a group in transposed copies: a multiple of kGroupPad, which is what one wgmma of the
// grouped matmul contracts (ATen's takes multiples of 16), and at least that, because ATen's
// refuses an empty contraction.
inline constexpr int64_t kGroupPad = 32;
constexpr int64_t padded_group(int64_t rows) {
  return rows > kGroupPad ? (rows + kGroupPad - 1) / kGroupPad * kGroupPad : kGroupPad;
}

// A table of the 128-row tiles into which groups are cut, and of the places of groups in transposed
// copies. The last tiles have no rows: they fill what is left of the columns with zeros.
struct GroupTile {
  int32_t row = 0;      // first row of x
  int32_t extents = 0;  // rows in it | columns to write << 8, each at most 128 | first tile << 16
  int32_t column = 0;   // first column of the transposed copy
  int32_t group = -1;   // -1: no such tile
};
inline constexpr int64_t kGroupTileRows = 128;
inline int64_t max_group_tiles(int64_t rows, int64_t groups) {
  return rows / kGroupTileRows + groups + (groups + 1) * kGroupPad / kGroupTileRows + 1;
}
// Columns of a transposed copy that hold `rows` rows in `groups` groups, whatever their sizes.
template <typename Int>  // int64_t, or a symbolic one
Int max_padded_rows(const Int& rows, const Int& groups) {
  return (rows + (kGroupPad - 1)) / kGroupPad * kGroupPad + groups * kGroupPad;
}
struct TileTableArgs {
  const int32_t* offsets = nullptr;  // [groups]
  int64_t groups = 0;
  int64_t rows = 0;
  GroupTile* tiles = nullptr;         // [max_group_tiles(rows, groups)], 16-byte aligned
  int32_t* padded_offsets = nullptr;  // [groups]
};
void make_tile_table(const TileTableArgs& args, Stream stream);

// Transposed copies with one scale per group and column: codes of x's columns, zeros in the
// padding. Two launches, and x is read twice, unless its maxima are known.
//   ragged (tiles given): data_t [cols, ld_t], groups beside each other as the tile table says.
//   uniform: groups of group_rows rows each; data_t [groups, cols, ld_t] with ld_t >= group_rows.
struct GroupColumnsArgs {
  const void* x = nullptr;  // [.., cols]
  Dtype x_dtype = Dtype::kBFloat16;
  int64_t cols = 0;
  int64_t ld = 0;
  int64_t groups = 0;
  int64_t group_rows = 0;            // uniform
  const GroupTile* tiles = nullptr;  // ragged: [tile_count]
  int64_t tile_count = 0;
  const int32_t* source =
      nullptr;  // ragged, optional: row r of the groups is row source[r] / copies
  int64_t copies = 1;
  void* data_t = nullptr;    // 16-byte aligned
  int64_t ld_t = 0;          // multiple of 16
  float* scale_t = nullptr;  // [groups, cols]
  uint32_t* amax =
      nullptr;  // [groups, cols], a workspace: the maxima of |x|, as the bits of floats
  bool amax_is_known = false;  // it has them already, QuantizeArgs' column_amax: one launch
  Dtype dtype = Dtype::kE4M3;
  bool power_of_two = false;
};
void quantize_group_columns(const GroupColumnsArgs& args, Stream stream);

// Each matrix of a stack in squares of 128 x 128, as it lies and transposed, in one launch: the
// codes and scales that quantize makes of one matrix after the other, without padding of codes.
// Scales of [rows, cols] are [blocks of rows, blocks of cols up to a multiple of 4].
struct StackSquaresArgs {
  const void* x = nullptr;  // [groups, rows, cols]
  Dtype x_dtype = Dtype::kBFloat16;
  int64_t groups = 0;
  int64_t rows = 0;          // multiple of 16
  int64_t cols = 0;          // the same
  void* data = nullptr;      // [groups, rows, cols] codes, optional; 16-byte aligned
  float* scale = nullptr;    // with data: of each matrix
  void* data_t = nullptr;    // [groups, cols, rows] codes, optional; 16-byte aligned
  float* scale_t = nullptr;  // with data_t: of each, transposed
  Dtype dtype = Dtype::kE4M3;
  bool power_of_two = false;
};
void quantize_stack_squares(const StackSquaresArgs& args, Stream stream);

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kClampedSilu };

// h = act(gate) * up of each row that belongs to a group, rounded to x's dtype. kClampedSilu is
// gpt-oss': gate = min(gate, limit), up = clamp(up, -limit, limit),
// h = gate * sigmoid(alpha * gate) * (up + 1).
struct GateArgs {
  const void* gate_up = nullptr;  // [rows, 2 * features]: gates, then ups; or interleaved in pairs
  Dtype dtype = Dtype::kBFloat16;
  int64_t rows = 0;
  int64_t features = 0;  // multiple of 16
  int64_t groups = 0;
  const int32_t* offsets = nullptr;  // [groups]; without, all rows are one group
  const void* bias = nullptr;        // [groups, 2 * features] in dtype, laid out as a row; optional
  Activation activation = Activation::kSilu;
  bool interleaved = false;
  float alpha = 1.702F;
  float limit = 7.0F;
};
struct GateForwardArgs {
  GateArgs gate;
  void* data = nullptr;    // [rows, features] codes
  float* scale = nullptr;  // [rows], or [blocks of features, rows]
  Dtype dtype = Dtype::kE4M3;
  Granularity granularity = Granularity::kRowwise;  // or kBlock1x128
  bool power_of_two = false;
};
void gate_forward(const GateForwardArgs& args, Stream stream);

// From dh, the gradient of h before its routing weight: the gradient of gate_up, d = w * dh * ..,
// quantized rowwise and as it is; w * h, the right operand of down's weight gradient; and the
// gradient of the routing weight, sum(dh * h) (+ dy . bias of down, which the caller adds).
struct GateBackwardArgs {
  GateArgs gate;
  const void* dh = nullptr;         // [rows, features] in dtype
  const float* weights = nullptr;   // [slots]
  const int32_t* source = nullptr;  // [rows]
  void* data = nullptr;             // [rows, 2 * features] codes, optional
  float* scale = nullptr;           // [rows], with data
  void* d_gate_up = nullptr;        // [rows, 2 * features] in dtype, optional
  void* weighted_h = nullptr;       // [rows, features] in dtype, optional
  float* d_weights = nullptr;       // [slots], optional; slots of no group are left alone
  Dtype dtype = Dtype::kE4M3;       // of data
  bool power_of_two = false;
};
void gate_backward(const GateBackwardArgs& args, Stream stream);

// out[t] = sum over a token's choices of weights[slot] * (x[place[slot]] + bias[expert]), in fp32,
// in the order of the choices, rounded once. Slots of no group are left out.
struct CombineArgs {
  const void* x = nullptr;  // [rows, cols]
  Dtype dtype = Dtype::kBFloat16;
  int64_t tokens = 0;
  int64_t top_k = 0;
  int64_t cols = 0;  // multiple of 8
  int64_t groups = 0;
  const int32_t* offsets = nullptr;
  const int32_t* place = nullptr;    // [tokens * top_k]
  const float* weights = nullptr;    // [tokens * top_k], or nullptr for ones
  const int64_t* experts = nullptr;  // [tokens * top_k], with bias
  const void* bias = nullptr;        // [groups, cols] in dtype, optional
  void* out = nullptr;               // [tokens, cols]
};
void combine(const CombineArgs& args, Stream stream);

// In place: rows past the last offset become zeros, the others get their group's bias, if there is
// one.
struct FinishRowsArgs {
  void* x = nullptr;  // [rows, cols]
  Dtype dtype = Dtype::kBFloat16;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;
  int64_t groups = 0;
  const int32_t* offsets = nullptr;
  const void* bias = nullptr;  // [groups, cols] contiguous in dtype, optional
};
void finish_rows(const FinishRowsArgs& args, Stream stream);

// out[g] = sum over a group's rows of (weight of the row) * x[row], in fp32 and in a fixed order.
struct GroupSumsArgs {
  const void* x = nullptr;  // [.., cols]
  Dtype dtype = Dtype::kBFloat16;
  int64_t cols = 0;
  int64_t ld = 0;
  int64_t groups = 0;
  const int32_t* offsets = nullptr;
  const int32_t* source = nullptr;  // optional: row r is x's row source[r] / copies
  int64_t copies = 1;
  const float* weights = nullptr;  // [slots], with source; optional
  void* out = nullptr;             // [groups, cols] in dtype
};
void group_sums(const GroupSumsArgs& args, Stream stream);

// Grouped FP8 matmul of e4m3 codes, on Hopper:
//   rows     out[r, :] = a[r, :] b[g]^T for each row r of group g
//   columns  out[g] = a[:, L] b[:, L]^T, L the columns of group g: weight gradients
// times the scales of a's rows and b's. What tensor cores add up is promoted to fp32 every 128 of
// the contraction, unless fast_accum; block scales are multiplied in there.
//
// Groups of rows begin and end anywhere, none is padded, and rows past the last offset are neither
// read for a result nor written. Groups of columns begin anywhere and have a multiple of kGroupPad
// columns, zeros beyond their own; one without columns gives zeros (or adds none). Offsets that
// descend or exceed the extent give undefined values, but nothing is written out of bounds.
// Deterministic: one order of sums, whatever the other groups are.
struct GroupedMmArgs {
  bool columns = false;
  int64_t groups = 0;                // 1 to kMaxGroups
  int64_t m = 0;                     // rows of a
  int64_t n = 0;                     // rows of b, in each group; a multiple of 8
  int64_t k = 0;                     // codes in a row of either, without gaps; a multiple of 16
  const int32_t* offsets = nullptr;  // [groups], in a's rows or both's columns; 1 group: optional
  const void* a = nullptr;           // [m, k], 16-byte aligned
  const void* b = nullptr;           // [groups, n, k]; columns: [n, k]; 16-byte aligned
  // rows: kTensorwise, kRowwise, or kBlock1x128 for a with kBlock128x128 for b; columns: kRowwise.
  Granularity granularity = Granularity::kRowwise;
  const float* a_scale = nullptr;  // one; [m]; [ceil(k / 128), a_scale_ld]; columns: [groups, m]
  const float* b_scale = nullptr;  // one; [groups, n]; [groups, ceil(n / 128), b_scale_ld]
  int64_t a_scale_ld = 0;          // blocks: at least m
  int64_t b_scale_ld = 0;          // blocks: at least ceil(k / 128)
  void* out = nullptr;             // [m, n]; columns: [groups, m, n]; 16-byte aligned
  Dtype out_dtype = Dtype::kBFloat16;  // kBFloat16, kFloat16, kFloat32
  bool fast_accum = false;
  bool accumulate = false;  // kFloat32: out += the product
};
// Whether grouped_mm takes the problem on the current device: compute capability 9.0, and what is
// said above of extents and alignment.
bool suits_grouped_mm(const GroupedMmArgs& args);
void grouped_mm(const GroupedMmArgs& args, Stream stream);

}  // namespace fp8::core
