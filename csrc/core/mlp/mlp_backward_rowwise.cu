// The backward of an MLP's unit with a scale for each row of what the products read: rows of the
// two gradients for dx, their columns and h's for the weight gradients. A pass that leaves the
// maxima of rows and columns in parts, a small one that joins them, and a cast pass over tiles that
// computes the three anew (tile.cuh). Bound by bandwidth: 6 bytes, then 6 + 5 an element (bf16).
#include <algorithm>

#include "core/device/device.h"
#include "core/device/dispatch.cuh"
#include "core/mlp/backward_tile.cuh"

namespace fp8::core {
namespace {

// What the maxima are of: gate's and up's gradient, and h, of which rows are not needed.
constexpr int kColumnParts = 3;
constexpr int kRowParts = 2;

struct AxisParams {
  MlpBackwardArgs args;
  UnitAmaxPlan plan;
  unsigned col_tiles;  // of the cast pass
  unsigned row_tiles;
  int64_t padded_rows;
  uint32_t* row_amax;     // [kRowParts, plan.col_tiles, rows]
  uint32_t* col_amax;     // [kColumnParts, plan.row_chunks, features]
  float* row_multiplier;  // [kRowParts, padded_rows]
  float* col_multiplier;  // [kColumnParts, features]
};

template <typename T>
constexpr int kAxisBlocks = sizeof(T) == 4 ? 1 : 2;

template <typename Reads, typename Act>
__global__ void __launch_bounds__(kThreads, kAxisBlocks<typename Reads::Element>)
    unit_axis_amax_kernel(const AxisParams p) {
  using T = typename Reads::Element;
  constexpr bool kGated = Reads::kGated;
  constexpr int kWords = Vec8<T>::kWords;
  __shared__ uint32_t of_warp[kWarps][32][kWords + 1];  // a word more: no bank conflicts
  let_next_start();
  const MlpBackwardArgs& a = p.args;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t col = blockIdx.x * kUnitAmaxCols + lane * 8;
  const bool has_col = col < a.unit.features;
  const int64_t begin = blockIdx.y * p.plan.rows_per_chunk;
  const int64_t end = min(begin + p.plan.rows_per_chunk, a.unit.rows);
  PackedAmax<T> amax[kColumnParts];
#pragma unroll
  for (auto& part : amax) part.clear();
  wait_for_previous();
  for (int64_t row = begin + warp; row < end; row += kUnitAmaxRows) {
    UnitInputs<T> in[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // something that exists where there is nothing
      in[i] = fetch_unit<Reads>(a.unit, a.dh, a.dh_ld, min(row + i * kWarps, end - 1),
                                min(col, a.unit.features - 8));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const UnitResults<T> d =
          unit_backward<T, kGated, Act>(in[i].gate, in[i].up, in[i].dh, a.unit);
      const int64_t at = row + i * kWarps;
      // The last row again, or the last columns, change no maximum of a column that exists.
      amax[0].update(d.gate);
      if constexpr (kGated) amax[1].update(d.up);
      amax[2].update(d.h);
      if (a.dh == nullptr) continue;
      const uint32_t gate_bits = warp_max(has_col ? amax_bits(d.gate) : 0);
      uint32_t up_bits = 0;
      if constexpr (kGated) up_bits = warp_max(has_col ? amax_bits(d.up) : 0);
      if (lane != 0 || at >= end) continue;
      const int64_t place = blockIdx.x * a.unit.rows + at;
      p.row_amax[place] = gate_bits;
      if constexpr (kGated) p.row_amax[p.plan.col_tiles * a.unit.rows + place] = up_bits;
    }
  }
#pragma unroll
  for (int part = 0; part < kColumnParts; ++part) {
    if (!kGated && part == 1) continue;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWords; ++i) of_warp[warp][lane][i] = amax[part].words[i];
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x);  // of the block's 256
    PackedAmax<T> joined;
    joined.clear();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t word = of_warp[w][column / 8][i];
        joined.words[i] =
            sizeof(T) == 4 ? max(joined.words[i], word) : __vmaxu2(joined.words[i], word);
      }
    }
    uint32_t bits = 0;  // without indexing registers by a variable
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (column % 8 == j) bits = joined.float_bits(j);
    }
    const int64_t at = blockIdx.x * kUnitAmaxCols + column;
    if (at < a.unit.features) {
      p.col_amax[(part * p.plan.row_chunks + blockIdx.y) * a.unit.features + at] = bits;
    }
  }
}

// A thread joins the parts of one row, or of one column.
template <bool kGated>
__global__ void __launch_bounds__(kThreads) unit_axis_join_kernel(const AxisParams p) {
  let_next_start();
  wait_for_previous();
  const MlpBackwardArgs& a = p.args;
  int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < p.padded_rows) {
    if (a.dh == nullptr) return;
    uint32_t bits[kRowParts] = {0, 0};
#pragma unroll
    for (int part = 0; part < (kGated ? kRowParts : 1); ++part) {
      if (at >= a.unit.rows) continue;
      bits[part] = max_of<8>(p.row_amax + part * p.plan.col_tiles * a.unit.rows + at, a.unit.rows,
                             static_cast<int>(p.plan.col_tiles));
    }
    if (a.joint) bits[0] = bits[1] = max(bits[0], bits[1]);
#pragma unroll
    for (int part = 0; part < (kGated ? kRowParts : 1); ++part) {
      const GroupScale scale = scale_from_amax(bits[part], E4M3::kMax, a.power_of_two);
      p.row_multiplier[part * p.padded_rows + at] = scale.quant_multiplier;
      float* out = part == 0 ? a.gate_scale : a.up_scale;
      if (out != nullptr) out[at] = scale.scale;
    }
    return;
  }
  at -= p.padded_rows;
  if (at >= a.unit.features) return;
#pragma unroll
  for (int part = 0; part < kColumnParts; ++part) {
    if (!kGated && part == 1) continue;
    const uint32_t* parts = p.col_amax + part * p.plan.row_chunks * a.unit.features + at;
    const uint32_t bits = max_of<8>(parts, a.unit.features, static_cast<int>(p.plan.row_chunks));
    const GroupScale scale = scale_from_amax(bits, E4M3::kMax, a.power_of_two);
    p.col_multiplier[part * a.unit.features + at] = scale.quant_multiplier;
    float* out = part == 0 ? a.gate_t_scale : part == 1 ? a.up_t_scale : a.h_scale;
    if (out != nullptr) out[at] = scale.scale;
  }
}

template <typename Reads, typename Act, typename T = typename Reads::Element>
constexpr int kAxisCastBlocks =
    std::is_same_v<Act, Silu> ? kUnitCastBlocks<T, Act> : kFewerBlocks<T, Reads::kGated, Act>;

template <typename Reads, typename Act>
__global__ void __launch_bounds__(kThreads, kAxisCastBlocks<Reads, Act>)
    unit_axis_cast_kernel(const AxisParams p) {
  using T = typename Reads::Element;
  constexpr bool kGated = Reads::kGated;
  extern __shared__ uint4 slots[];
  __shared__ alignas(16) uint32_t turning[3][kTransposedWords];
  __shared__ alignas(16) float col_multiplier[kColumnParts][kTileCols];
  let_next_start();
  const MlpBackwardArgs& a = p.args;
  const auto place = [&](unsigned tile) { return from_below(p, tile); };
  const TileInputs<Reads> inputs(a, slots, place(blockIdx.x));
  wait_for_previous();

  for_tiles(inputs, p.col_tiles * p.row_tiles, place, [&](unsigned tile, const auto& take) {
    const UnitTile at = place(tile);
    for (int i = static_cast<int>(threadIdx.x); i < kColumnParts * kTileCols; i += kThreads) {
      const int64_t col = at.col + i % kTileCols;
      const bool made = (kGated || i / kTileCols != 1) && col < a.unit.features;
      (&col_multiplier[0][0])[i] =
          made ? __ldcg(p.col_multiplier + i / kTileCols * a.unit.features + col) : 1.0F;
    }
    __syncthreads();

    uint2 gate[kRowsPerThread];
    [[maybe_unused]] uint2 up[kRowsPerThread];
    uint2 h[kRowsPerThread];
    const int first = static_cast<int>(at.col0 - at.col);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const UnitInputs<T> in = take(r);
      const UnitResults<T> d = unit_backward<T, kGated, Act>(in.gate, in.up, in.dh, a.unit);
      const int64_t row = at.row0 + r;
      const int valid = row < a.unit.rows && at.col0 < a.unit.features ? 8 : 0;
      const auto put = [&](const Destination& to, int part, const Vec8<T>& v) {
        if (to.data == nullptr || row >= to.rows || at.col0 >= a.unit.features) return;
        const float multiplier = __ldcg(p.row_multiplier + part * p.padded_rows + row);
        *reinterpret_cast<uint2*>(static_cast<uint8_t*>(to.data) + row * to.ld + at.col0) =
            keep_first(encode8<E4M3>(v, [&](int) { return multiplier; }), valid);
      };
      put(a.gate, 0, d.gate);
      if constexpr (kGated) put(a.up, 1, d.up);
      const auto by_column = [&](int part, const Vec8<T>& v) {
        return keep_first(encode8<E4M3>(v, [&](int j) { return col_multiplier[part][first + j]; }),
                          valid);
      };
      gate[r] = by_column(0, d.gate);
      if constexpr (kGated) up[r] = by_column(1, d.up);
      h[r] = by_column(2, d.h);
    }
    store_transposed<kGated>(a, at, gate, up, h, turning);
  });
}

int64_t padded_rows_of(const MlpBackwardArgs& args) {
  return std::max({args.unit.rows, args.gate.data != nullptr ? args.gate.rows : 0,
                   args.up.data != nullptr ? args.up.rows : 0});
}

}  // namespace

size_t rowwise_workspace_words(const MlpBackwardArgs& args, const UnitAmaxPlan& plan) {
  const int64_t features = args.unit.features;
  return static_cast<size_t>(kRowParts * (plan.col_tiles * args.unit.rows + padded_rows_of(args)) +
                             kColumnParts * (plan.row_chunks + 1) * features);
}

void launch_backward_rowwise(const BackwardParams& params, const DeviceInfo& device,
                             cudaStream_t stream) {
  const MlpBackwardArgs& a = params.args;
  require(a.dtype == Dtype::kE4M3, "mlp_backward makes e4m3 with a scale for each row");
  AxisParams p{.args = a,
               .plan = params.plan,
               .col_tiles = params.col_tiles,
               .row_tiles = params.row_tiles,
               .padded_rows = padded_rows_of(a)};
  p.row_amax = static_cast<uint32_t*>(a.workspace);
  p.col_amax = p.row_amax + kRowParts * p.plan.col_tiles * a.unit.rows;
  p.row_multiplier =
      reinterpret_cast<float*>(p.col_amax + kColumnParts * p.plan.row_chunks * a.unit.features);
  p.col_multiplier = p.row_multiplier + kRowParts * p.padded_rows;
  const bool pdl = has_hopper_launches(device);
  const dim3 grid(static_cast<unsigned>(p.plan.col_tiles),
                  static_cast<unsigned>(p.plan.row_chunks));
  const auto joins =
      static_cast<unsigned>(ceil_div(p.padded_rows + a.unit.features, int64_t{kThreads}));
  with_unit_reads(a.unit, [&](auto reads, auto activation) {
    using Reads = decltype(reads);
    using Act = typename decltype(activation)::type;
    launch(unit_axis_amax_kernel<Reads, Act>, grid, kThreads, stream, p);
    launch(unit_axis_join_kernel<Reads::kGated>, joins, kThreads, stream, p, {.pdl = pdl});
    launch_tiles<unit_axis_cast_kernel<Reads, Act>, TileInputs<Reads>>(
        int64_t{p.col_tiles} * p.row_tiles, kAxisCastBlocks<Reads, Act>, device, stream, p, pdl);
  });
}

}  // namespace fp8::core
