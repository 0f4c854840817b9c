// The backward of an MLP's unit with delayed scales: one cast pass with guesses from the histories
// (as core/quantize/cast.cuh has it of one matrix), then a launch that looks whether the guesses
// were right, moves the histories on, and casts again where they were not (settle_delayed.cuh).
// Bound by bandwidth: 6 + 5 bytes an element (bf16).
#include <algorithm>

#include "core/device/device.h"
#include "core/device/dispatch.cuh"
#include "core/mlp/backward_tile.cuh"
#include "core/quantize/settle_delayed.cuh"

namespace fp8::core {
namespace {

// Whether a gradient is made at all: gate's is part 0, up's 1.
template <bool kGated>
__device__ __forceinline__ bool is_made(const MlpBackwardArgs& a, int part) {
  if (part == 0) return a.gate.data != nullptr || a.gate_t.data != nullptr;
  return kGated && (a.up.data != nullptr || a.up_t.data != nullptr);
}
__device__ __forceinline__ const uint32_t* history_of(const MlpBackwardArgs& a, int part) {
  return part == 0 || a.joint ? a.gate_history : a.up_history;
}

template <typename Reads, typename Act>
constexpr int kFewerBlocksOf = kFewerBlocks<typename Reads::Element, Reads::kGated, Act>;

template <typename T>
constexpr uint32_t kMagnitude = sizeof(T) == 4 ? 0x7FFFFFFFU : 0x7FFF7FFFU;
template <typename T>  // two, of 16 bits
constexpr uint32_t kInfinities = std::is_same_v<T, __half> ? 0x7C007C00U : 0x7F807F80U;

// Whether none of the eight is Inf or NaN.
template <typename T>
__device__ __forceinline__ bool all_finite(const Vec8<T>& v) {
  PackedAmax<T> amax;
  amax.clear();
  amax.update(v);
  uint32_t most = amax.words[0];
#pragma unroll
  for (int i = 1; i < Vec8<T>::kWords; ++i) {
    most = sizeof(T) == 4 ? max(most, amax.words[i]) : __vmaxu2(most, amax.words[i]);
  }
  if constexpr (sizeof(T) == 4) return most < kExponentBits;
  // A half of Inf or more reaches its sign bit.
  return ((most + (0x80008000U - kInfinities<T>)) & 0x80008000U) == 0;
}

// What a thread saw of its rows of one gradient: the amax of finite values.
template <typename T>
struct Seen {
  PackedAmax<T> amax;

  // Inf becomes NaN, and neither counts.
  __device__ __forceinline__ void look(Vec8<T>& v) {
    if (all_finite(v)) {  // nearly always, and a quarter of the instructions
      amax.update(v);
      return;
    }
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) {
      const uint32_t size = v.words[i] & kMagnitude<T>;
      if constexpr (sizeof(T) == 4) {
        if (size < kExponentBits) amax.words[i] = max(amax.words[i], size);
      } else {
        amax.words[i] = __vmaxu2(amax.words[i], size & __vcmpltu2(size, kInfinities<T>));
      }
    }
    infinite_to_nan(v);
  }
  // amax and fingerprint over the warp, as examine (cast.cuh) has them.
  __device__ __forceinline__ uint2 report(uint32_t place) const {
    const uint32_t print = warp_add(mix_bits(amax.fold() ^ place * 0x9E3779B1U));
    return make_uint2(warp_max(amax.max_float_bits()), print);
  }
};

template <typename Reads, typename Format, typename Act>
__global__ void __launch_bounds__(kThreads, kFewerBlocksOf<Reads, Act>)
    unit_cast_delayed_kernel(const BackwardParams p) {
  using T = typename Reads::Element;
  constexpr bool kGated = Reads::kGated;
  constexpr int kParts = kGated ? 2 : 1;
  extern __shared__ uint4 slots[];
  __shared__ alignas(16) uint32_t turning[3][kTransposedWords];
  __shared__ uint2 warp_report[kParts][kWarps];
  __shared__ uint32_t guesses[kParts];
  let_next_start();
  const MlpBackwardArgs& a = p.args;
  const auto place = [&](unsigned tile) {
    return UnitTile(tile / p.col_tiles, tile % p.col_tiles);
  };
  const TileInputs<Reads> inputs(a, slots, place(blockIdx.x));
  wait_for_previous();

  const unsigned tiles = p.col_tiles * p.row_tiles;
  UnitMultipliers multipliers;
  multipliers.h = h_multiplier(a, blockIdx.x == 0 && threadIdx.x == 0);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (!is_made<kGated>(a, part)) continue;
    const uint32_t* history = history_of(a, part);
    if (static_cast<int>(threadIdx.x) / 32 == part) {
      const uint32_t guess = guessed_amax(history);
      if (threadIdx.x % 32 == 0) guesses[part] = guess;
    }
    if (blockIdx.x == 0 && threadIdx.x < kAmaxHistorySize) {
      p.history_before[part * kAmaxHistorySize + threadIdx.x] = __ldcg(history + threadIdx.x);
    }
  }
  __syncthreads();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (!is_made<kGated>(a, part)) continue;
    const GroupScale scale = scale_from_amax(guesses[part], Format::kMax, a.power_of_two);
    (part == 0 ? multipliers.gate : multipliers.up) = scale.quant_multiplier;
  }

  for_tiles(inputs, tiles, place, [&](unsigned tile, const auto& take) {
    const UnitTile at = place(tile);
    Seen<T> seen[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) seen[part].amax.clear();
    cast_unit_tile<T, Format, kGated, Act>(a, at, take, multipliers, turning,
                                           [&](UnitResults<T>& d) {
                                             seen[0].look(d.gate);
                                             if constexpr (kGated) seen[1].look(d.up);
                                           });

    // A tile's number in the matrix that a gradient is part of.
    const unsigned tile_col = tile % p.col_tiles;
    const unsigned across = a.joint ? 2 * p.col_tiles : p.col_tiles;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const bool second = a.joint && (part == 1) != a.gate_second;
      const unsigned number = tile / p.col_tiles * across + tile_col + (second ? p.col_tiles : 0);
      const uint2 of_warp = seen[part].report(number * kThreads + threadIdx.x);
      if (threadIdx.x % 32 == 0) warp_report[part][threadIdx.x / 32] = of_warp;
    }
    __syncthreads();
    if (threadIdx.x >= kParts) return;
    uint2 all = warp_report[threadIdx.x][0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) {
      all.x = max(all.x, warp_report[threadIdx.x][i].x);
      all.y += warp_report[threadIdx.x][i].y;
    }
    const int64_t report = static_cast<int64_t>(threadIdx.x) * tiles + tile;
    p.tile_report[report] = all;
    // Of each tile: where another stream writes the history meanwhile, guesses differ.
    if (is_made<kGated>(a, static_cast<int>(threadIdx.x))) {
      p.tile_guess[report] = guesses[threadIdx.x];
    }
  });
}

struct Settled {
  float quant_multiplier;
  uint32_t used;
};

// What makes the scale of a gradient with `reports` tiles; by the first block the history moves on.
template <typename Format>
__device__ __forceinline__ Settled settle(const BackwardParams& p, int part, int64_t reports,
                                          uint32_t* history, float* scale_out, uint32_t* scratch) {
  const int64_t tiles = static_cast<int64_t>(p.col_tiles) * p.row_tiles;
  const uint2 own = whole_report(p.tile_report + part * tiles, reports, scratch);
  const uint32_t* before = p.history_before + part * kAmaxHistorySize;
  const SettledAmax settled = settled_in_block<Format>(before, own, scratch);
  const GroupScale scale = scale_from_amax(settled.used, Format::kMax, p.args.power_of_two);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *scale_out = scale.scale;
    if (!settled.repeats) {
      leave_record(history, __ldcg(before + kHistoryCount), own.x, settled.used, own.y);
    }
    history[kHistoryGuess] = settled.repeats ? settled.used : 0;
  }
  return {scale.quant_multiplier, settled.used};
}

template <typename Reads, typename Format, typename Act>
__global__ void __launch_bounds__(kThreads, kFewerBlocksOf<Reads, Act>)
    unit_settle_kernel(const BackwardParams p) {
  using T = typename Reads::Element;
  constexpr bool kGated = Reads::kGated;
  extern __shared__ uint4 slots[];
  __shared__ alignas(16) uint32_t turning[3][kTransposedWords];
  __shared__ uint32_t scratch[2][2 * kWarps];
  let_next_start();
  wait_for_previous();
  const MlpBackwardArgs& a = p.args;
  const int64_t tiles = static_cast<int64_t>(p.col_tiles) * p.row_tiles;
  UnitMultipliers multipliers;
  multipliers.h = h_multiplier(a, /*writes_scale=*/false);
  bool again = false;
  if (is_made<kGated>(a, 0)) {
    const Settled of_gate =
        settle<Format>(p, 0, a.joint ? 2 * tiles : tiles, a.gate_history, a.gate_scale, scratch[0]);
    multipliers.gate = of_gate.quant_multiplier;
    again = cast_otherwise(p.tile_guess, tiles, of_gate.used);
    if (kGated && a.joint) {
      multipliers.up = of_gate.quant_multiplier;
      again = cast_otherwise(p.tile_guess + tiles, tiles, of_gate.used) || again;
    }
  }
  if (!a.joint && is_made<kGated>(a, 1)) {
    const Settled of_up = settle<Format>(p, 1, tiles, a.up_history, a.up_scale, scratch[1]);
    multipliers.up = of_up.quant_multiplier;
    again = cast_otherwise(p.tile_guess + tiles, tiles, of_up.used) || again;
  }
  if (!again) return;

  const auto place = [&](unsigned tile) {
    return UnitTile(tile / p.col_tiles, tile % p.col_tiles);
  };
  const TileInputs<Reads> inputs(a, slots, place(blockIdx.x));
  for_tiles(inputs, static_cast<unsigned>(tiles), place, [&](unsigned tile, const auto& take) {
    cast_unit_tile<T, Format, kGated, Act>(a, place(tile), take, multipliers, turning,
                                           [](UnitResults<T>& d) {
                                             infinite_to_nan(d.gate);
                                             if constexpr (kGated) infinite_to_nan(d.up);
                                           });
  });
}

}  // namespace

size_t delayed_workspace_words(const MlpBackwardArgs& args) {
  const UnitTiles tiles = plan_unit_tiles(args);
  return static_cast<size_t>(6 * tiles.cols * tiles.rows + 2 * kAmaxHistorySize);
}

void launch_backward_delayed(BackwardParams params, const DeviceInfo& device, cudaStream_t stream) {
  const MlpBackwardArgs& a = params.args;
  const int64_t tiles = static_cast<int64_t>(params.col_tiles) * params.row_tiles;
  params.tile_report = static_cast<uint2*>(a.workspace);
  params.tile_guess = reinterpret_cast<uint32_t*>(params.tile_report + 2 * tiles);
  params.history_before = params.tile_guess + 2 * tiles;
  with_unit_reads(a.unit, [&](auto reads, auto activation) {
    using Reads = decltype(reads);
    using Act = typename decltype(activation)::type;
    dispatch_format(a.dtype, [&](auto format) {
      using Format = typename decltype(format)::type;
      using Inputs = TileInputs<Reads>;
      constexpr int kBlocks = kFewerBlocksOf<Reads, Act>;
      launch_tiles<unit_cast_delayed_kernel<Reads, Format, Act>, Inputs>(
          tiles, kBlocks, device, stream, params, /*pdl=*/false);
      launch_tiles<unit_settle_kernel<Reads, Format, Act>, Inputs>(
          tiles, kBlocks, device, stream, params, has_hopper_launches(device), tiles);
    });
  });
}

}  // namespace fp8::core
