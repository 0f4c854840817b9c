// The backward of an MLP's unit, tensorwise: from gate, up and dh the gradients of gate and up in
// FP8, row-major and transposed, and h transposed with the scale that it had in the forward. An
// amax pass, then a cast pass over tiles (backward_tile.cuh) that computes the three anew.
// Bound by bandwidth: 6 bytes, then 6 + 5 an element (bf16). With scales that are delayed,
// mlp_backward_delayed.cu has one pass.
#include <algorithm>

#include "core/device/device.h"
#include "core/device/dispatch.cuh"
#include "core/mlp/backward_blockwise.h"
#include "core/mlp/backward_tile.cuh"
#include "core/mlp/plan.h"
#include "core/mlp/screen.cuh"

namespace fp8::core {
namespace {

template <typename T>
constexpr int kAmaxBlocks = sizeof(T) == 4 ? 1 : 3;

template <typename Reads>
__global__ void __launch_bounds__(kThreads, kAmaxBlocks<typename Reads::Element>)
    unit_amax_kernel(const BackwardParams p) {
  using T = typename Reads::Element;
  constexpr bool kGated = Reads::kGated;
  __shared__ uint32_t scratch[2][kWarps];
  let_next_start();
  const MlpBackwardArgs& a = p.args;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t col = blockIdx.x * kUnitAmaxCols + threadIdx.x % 32 * 8;
  const int64_t begin = blockIdx.y * p.plan.rows_per_chunk;
  const int64_t end = min(begin + p.plan.rows_per_chunk, a.unit.rows);
  uint32_t gate_bits = 0;
  uint32_t up_bits = 0;
  if (col < a.unit.features) {
    PackedAmax<T> of_gate;
    PackedAmax<T> of_up;
    of_gate.clear();
    of_up.clear();
    for (int64_t row = begin + warp; row < end; row += kUnitAmaxRows) {
      UnitInputs<T> in[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // the last row again where there is none
        in[i] = fetch_unit<Reads>(a.unit, a.dh, a.dh_ld, min(row + i * kWarps, end - 1), col);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const UnitResults<T> d = unit_backward<T, kGated>(in[i].gate, in[i].up, in[i].dh, a.unit);
        of_gate.update(d.gate);
        if constexpr (kGated) of_up.update(d.up);
      }
    }
    gate_bits = of_gate.max_float_bits();
    up_bits = of_up.max_float_bits();
  }
  gate_bits = block_max<kWarps>(gate_bits, scratch[0]);
  up_bits = block_max<kWarps>(up_bits, scratch[1]);
  wait_for_previous();
  if (threadIdx.x != 0) return;
  const int64_t part = blockIdx.y * p.plan.col_tiles + blockIdx.x;
  p.gate_amax[part] = gate_bits;
  p.up_amax[part] = up_bits;
}

// The same of what may raise them alone (screen.cuh).
template <typename Reads>
__global__ void __launch_bounds__(kThreads, kAmaxBlocks<typename Reads::Element>)
    unit_screened_amax_kernel(const BackwardParams p) {
  using T = typename Reads::Element;
  constexpr bool kGated = Reads::kGated;
  __shared__ uint32_t of_block[2];
  let_next_start();
  if (threadIdx.x < 2) of_block[threadIdx.x] = 0;
  __syncthreads();
  const MlpBackwardArgs& a = p.args;
  const int64_t own_col = blockIdx.x * kUnitAmaxCols + threadIdx.x % 32 * 8;
  const int64_t col = min(own_col, a.unit.features - 8);  // the last ones again
  const int64_t begin = blockIdx.y * p.plan.rows_per_chunk;
  const int64_t end = min(begin + p.plan.rows_per_chunk, a.unit.rows);
  RisingAmax of_gate(&of_block[0]);
  RisingAmax of_up(&of_block[1]);
  for (int64_t row = begin + threadIdx.x / 32; row < end; row += kUnitAmaxRows) {
    UnitInputs<T> in[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // the last row again where there is none
      in[i] = fetch_unit<Reads>(a.unit, a.dh, a.dh_ld, min(row + i * kWarps, end - 1), col);
    }
    of_gate.exchange();
    if constexpr (kGated) of_up.exchange();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const GradientEstimates estimates =
          gradient_estimates<T, kGated>(in[i].gate, in[i].up, in[i].dh);
      const bool gate_may = of_gate.may_rise(estimates.gate);
      const bool up_may = kGated && of_up.may_rise(estimates.up);
      if (!gate_may && !up_may) continue;
      const UnitResults<T> d =
          unit_backward_of<Silu, T, kGated>(in[i].gate, in[i].up, in[i].dh, a.unit);
      of_gate.raise(amax_bits(d.gate));
      if constexpr (kGated) of_up.raise(amax_bits(d.up));
    }
  }
  of_gate.exchange();
  if constexpr (kGated) of_up.exchange();
  __syncthreads();
  wait_for_previous();
  if (threadIdx.x != 0) return;
  const int64_t part = blockIdx.y * p.plan.col_tiles + blockIdx.x;
  p.gate_amax[part] = of_block[0];
  p.up_amax[part] = of_block[1];
}

// The maximum of the first pass's results, in every thread.
__device__ __forceinline__ uint32_t reduce_parts(const uint32_t* amax, int64_t parts,
                                                 uint32_t* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  const int count = (static_cast<int>(parts) - thread + kThreads - 1) / kThreads;
  return block_max<kWarps>(max_of<8>(amax + thread, kThreads, count), scratch);
}

template <typename Reads, typename Format, typename Act>
__global__ void __launch_bounds__(kThreads, kUnitCastBlocks<typename Reads::Element, Act>)
    unit_cast_kernel(const BackwardParams p) {
  using T = typename Reads::Element;
  constexpr bool kGated = Reads::kGated;
  extern __shared__ uint4 slots[];
  __shared__ alignas(16) uint32_t turning[3][kTransposedWords];
  __shared__ uint32_t scratch[2][kWarps];
  let_next_start();
  const MlpBackwardArgs& a = p.args;
  const auto place = [&](unsigned tile) { return from_below(p, tile); };
  const TileInputs<Reads> inputs(a, slots, place(blockIdx.x));
  wait_for_previous();

  const bool writes_scales = blockIdx.x == 0 && threadIdx.x == 0;
  UnitMultipliers multipliers;
  if (a.dh != nullptr) {
    uint32_t gate_bits = reduce_parts(p.gate_amax, p.plan.parts, scratch[0]);
    uint32_t up_bits = 0;
    if constexpr (kGated) {
      up_bits = reduce_parts(p.up_amax, p.plan.parts, scratch[1]);
      if (a.joint) gate_bits = up_bits = max(gate_bits, up_bits);
    }
    const GroupScale of_gate = scale_from_amax(gate_bits, Format::kMax, a.power_of_two);
    const GroupScale of_up = scale_from_amax(up_bits, Format::kMax, a.power_of_two);
    multipliers.gate = of_gate.quant_multiplier;
    multipliers.up = of_up.quant_multiplier;
    if (writes_scales) {
      if (a.gate_scale != nullptr) *a.gate_scale = of_gate.scale;
      if (a.up_scale != nullptr) *a.up_scale = of_up.scale;
    }
  }
  multipliers.h = h_multiplier(a, writes_scales);
  for_tiles(inputs, p.col_tiles * p.row_tiles, place, [&](unsigned tile, const auto& take) {
    cast_unit_tile<T, Format, kGated, Act>(a, place(tile), take, multipliers, turning,
                                           [](UnitResults<T>&) {});
  });
}

template <typename Reads>
void launch_amax(const BackwardParams& params, cudaStream_t stream) {
  const UnitAmaxPlan& plan = params.plan;
  const dim3 grid(static_cast<unsigned>(plan.col_tiles), static_cast<unsigned>(plan.row_chunks));
  const auto go = [&](auto kernel) { launch(kernel, grid, kThreads, stream, params); };
  if constexpr (std::is_same_v<typename Reads::Element, __nv_bfloat16>) {
    if (has_screen(params.args.unit)) return go(unit_screened_amax_kernel<Reads>);
  }
  if constexpr (!Reads::kCodes) go(unit_amax_kernel<Reads>);  // what has codes has a screen
}

}  // namespace

bool mlp_backward_takes_codes(const MlpUnitArgs& unit) { return reads_codes(unit); }

size_t mlp_backward_workspace_bytes(const MlpBackwardArgs& args) {
  if (args.granularity == Granularity::kBlock1x128) return 0;
  const UnitAmaxPlan plan = plan_unit_amax(args.unit, current_device(args.unit.device).sm_count);
  if (args.granularity == Granularity::kRowwise) {
    return rowwise_workspace_words(args, plan) * sizeof(uint32_t);
  }
  if (args.dh == nullptr) return 0;
  if (args.delayed) return delayed_workspace_words(args) * sizeof(uint32_t);
  return 2 * sizeof(uint32_t) * static_cast<size_t>(plan.parts);
}

void mlp_backward(const MlpBackwardArgs& args, Stream stream) {
  const MlpUnitArgs& unit = args.unit;
  check_unit(unit);
  require(args.h_dtype == Dtype::kE4M3, "mlp_backward makes h in e4m3");
  require(on_16_bytes(args.dh) && args.dh_ld % 8 == 0, "mlp_backward expects aligned rows of dh");
  for (const Destination& to : {args.gate, args.up, args.gate_t, args.up_t, args.h_t}) {
    require(on_16_bytes(to.data) && to.ld % kPad == 0, "mlp_backward expects aligned rows");
  }
  const UnitTiles tiles = plan_unit_tiles(args);
  require(tiles.cols * tiles.rows <= kMaxGridX &&
              std::max({unit.rows, unit.ld, args.dh_ld}) < kMaxGridX,
          "mlp_backward expects fewer elements");
  if (args.granularity == Granularity::kBlock1x128) return launch_backward_blockwise(args, stream);
  const DeviceInfo device = current_device(unit.device);
  require(args.dh == nullptr || args.workspace != nullptr, "mlp_backward expects a workspace");
  BackwardParams params{.args = args,
                        .col_tiles = static_cast<unsigned>(tiles.cols),
                        .row_tiles = static_cast<unsigned>(tiles.rows)};
  params.plan = plan_unit_amax(unit, device.sm_count);
  if (args.granularity == Granularity::kRowwise) {
    require(args.workspace != nullptr, "mlp_backward expects a workspace");
    return launch_backward_rowwise(params, device, stream);
  }
  require(args.granularity == Granularity::kTensorwise, "mlp_backward has no such scales");
  if (args.delayed && args.dh != nullptr) {
    return launch_backward_delayed(params, device, stream);
  }
  params.gate_amax = static_cast<uint32_t*>(args.workspace);
  if (args.dh != nullptr) params.up_amax = params.gate_amax + params.plan.parts;
  const bool gradients = args.dh != nullptr;
  with_unit_reads(unit, [&](auto reads, auto activation) {
    using Reads = decltype(reads);
    using Act = typename decltype(activation)::type;
    if (gradients) launch_amax<Reads>(params, stream);
    dispatch_format(args.dtype, [&](auto format) {
      using Format = typename decltype(format)::type;
      launch_tiles<unit_cast_kernel<Reads, Format, Act>, TileInputs<Reads>>(
          tiles.cols * tiles.rows, kUnitCastBlocks<typename Reads::Element, Act>, device, stream,
          params, gradients && has_hopper_launches(device));
    });
  });
}

}  // namespace fp8::core
