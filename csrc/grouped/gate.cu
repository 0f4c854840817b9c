// The gated activation between the two grouped matmuls, with quantization: h = act(gate) * up and
// its backward, one pass each.
//
// A row of gates and ups is read once into registers by 32 to 512 threads, which compute eight
// features at a time in fp32, round them to the input's dtype (as an activation module would), take
// the row's amax and write codes. Rows past the last offset are left alone. Bound by bandwidth:
// forward 4 + 1, backward 4 + 2 + 2 + 4 + 2 bytes a feature (bf16).
#include <algorithm>
#include <type_traits>

#include "common/transpose.cuh"
#include "grouped/device.cuh"

namespace fp8::core {
namespace {

constexpr int kMaxVectors =
    4;  // of eight features a thread; the backward keeps two results of each

struct GatePlan {
  int threads_per_row = 32;
  int rows_per_block = 8;
  int vectors = 1;
  int iterations = 1;
};

GatePlan plan_gate(int64_t features) {
  GatePlan plan;
  const int64_t vectors = ceil_div(features, 8);
  while (plan.threads_per_row < 512 && vectors > int64_t{2} * plan.threads_per_row)
    plan.threads_per_row *= 2;
  while (plan.vectors < kMaxVectors &&
         vectors > static_cast<int64_t>(plan.vectors) * plan.threads_per_row) {
    plan.vectors *= 2;
  }
  plan.rows_per_block = std::max(1, kThreads / plan.threads_per_row);
  plan.iterations = static_cast<int>(
      ceil_div(vectors, static_cast<int64_t>(plan.vectors) * plan.threads_per_row));
  return plan;
}

struct ForwardParams {
  GateForwardArgs args;
  GatePlan plan;
};
struct BackwardParams {
  GateBackwardArgs args;
  GatePlan plan;
};

// Where a thread works.
struct Place {
  int slot;  // which of the block's rows
  int thread;
  int64_t row;
  bool exists;
};

__device__ __forceinline__ Place place_of(const GateArgs& a, const GatePlan& plan) {
  const int slot = static_cast<int>(threadIdx.x) / plan.threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * plan.rows_per_block + slot;
  return {slot, static_cast<int>(threadIdx.x) % plan.threads_per_row, row,
          row < grouped_rows(a.offsets, a.groups, a.rows)};
}

struct GateValues {
  float gate[8];
  float up[8];
};

// Eight features from a row of gates and ups (or of their biases).
template <typename T>
__device__ __forceinline__ GateValues load_gate(const GateArgs& a, const T* row, int64_t feature) {
  GateValues g;
  if (a.interleaved) {
    const Vec8<T> first = load8(row + 2 * feature, 8, true);
    const Vec8<T> second = load8(row + 2 * feature + 8, 8, true);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      g.gate[j] = first.get(2 * j);
      g.up[j] = first.get(2 * j + 1);
      g.gate[j + 4] = second.get(2 * j);
      g.up[j + 4] = second.get(2 * j + 1);
    }
  } else {
    const Vec8<T> gate = load8(row + feature, 8, true);
    const Vec8<T> up = load8(row + a.features + feature, 8, true);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      g.gate[j] = gate.get(j);
      g.up[j] = up.get(j);
    }
  }
  return g;
}

template <typename T>
__device__ __forceinline__ GateValues load_biased(const GateArgs& a, int64_t row, int group,
                                                  int64_t feature) {
  GateValues g = load_gate(a, static_cast<const T*>(a.gate_up) + row * 2 * a.features, feature);
  if (a.bias == nullptr) return g;
  const GateValues b =
      load_gate(a, static_cast<const T*>(a.bias) + int64_t{group} * 2 * a.features, feature);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    g.gate[j] += b.gate[j];
    g.up[j] += b.up[j];
  }
  return g;
}

// Value and derivatives of one gated unit.
struct Unit {
  float h;
  float d_gate;
  float d_up;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }

template <bool kDerivatives>
__device__ __forceinline__ Unit gated_unit(const GateArgs& a, float gate, float up) {
  float act = 0.0F;
  float d_act = 0.0F;
  float factor = up;
  float d_factor = 1.0F;
  switch (a.activation) {
    case Activation::kSilu: {
      const float s = sigmoid(gate);
      act = gate * s;
      if (kDerivatives) d_act = s * (1.0F + gate * (1.0F - s));
      break;
    }
    case Activation::kGelu: {
      const float cdf = 0.5F * (1.0F + erff(gate * 0.70710678F));
      act = gate * cdf;
      if (kDerivatives) d_act = cdf + gate * 0.39894228F * expf(-0.5F * gate * gate);
      break;
    }
    case Activation::kGeluTanh: {
      const float inner = 0.79788456F * (gate + 0.044715F * gate * gate * gate);
      const float t = tanhf(inner);
      act = 0.5F * gate * (1.0F + t);
      if (kDerivatives) {
        d_act = 0.5F * (1.0F + t) + 0.5F * gate * (1.0F - t * t) * 0.79788456F *
                                        (1.0F + 3.0F * 0.044715F * gate * gate);
      }
      break;
    }
    case Activation::kClampedSilu: {
      // Clamps as torch does: NaN stays, and a value at the limit still has its gradient.
      const bool passes = !(gate > a.limit);
      const float clamped = passes ? gate : a.limit;
      const float s = sigmoid(a.alpha * clamped);
      act = clamped * s;
      if (kDerivatives && passes) d_act = s * (1.0F + a.alpha * clamped * (1.0F - s));
      const bool inside = !(up > a.limit) && !(up < -a.limit);
      factor = (inside ? up : up > 0.0F ? a.limit : -a.limit) + 1.0F;
      d_factor = inside ? 1.0F : 0.0F;
      break;
    }
  }
  return {act * factor, d_act * factor, act * d_factor};
}

// amax of a row from its threads' parts. warp_amax: one word a warp.
__device__ __forceinline__ uint32_t row_max(uint32_t bits, const GatePlan& plan, int slot,
                                            uint32_t* warp_amax) {
  bits = warp_max(bits);
  if (plan.threads_per_row == 32) return bits;
  if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = bits;
  __syncthreads();
  const int warps = plan.threads_per_row / 32;
  for (int w = 0; w < warps; ++w) bits = max(bits, warp_amax[slot * warps + w]);
  return bits;
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(512, 1) gate_forward_kernel(const ForwardParams p) {
  __shared__ uint32_t warp_amax[16];
  const GateArgs& a = p.args.gate;
  const Place at = place_of(a, p.plan);
  const int group = at.exists && a.bias != nullptr ? group_of(a.offsets, a.groups, at.row) : 0;
  const int64_t stride = static_cast<int64_t>(p.plan.threads_per_row) * 8;

  Vec8<T> h[kVectors];
  const auto compute = [&](int iteration) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t feature = (iteration * kVectors + i) * stride + at.thread * 8;
      h[i] = zero8<T>();
      if (!at.exists || feature >= a.features) continue;
      const GateValues g = load_biased<T>(a, at.row, group, feature);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        set_pair(h[i], j, gated_unit<false>(a, g.gate[2 * j], g.up[2 * j]).h,
                 gated_unit<false>(a, g.gate[2 * j + 1], g.up[2 * j + 1]).h);
      }
    }
  };

  PackedAmax<T> amax;
  amax.clear();
  for (int iteration = 0; iteration < p.plan.iterations; ++iteration) {
    compute(iteration);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) amax.update(h[i]);
  }
  const GroupScale scale =
      scale_from_amax(row_max(amax.max_float_bits(), p.plan, at.slot, warp_amax), E4M3::kMax);
  if (!at.exists) return;
  if (at.thread == 0) p.args.scale[at.row] = scale.scale;
  for (int iteration = 0; iteration < p.plan.iterations; ++iteration) {
    if (p.plan.iterations > 1) compute(iteration);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t feature = (iteration * kVectors + i) * stride + at.thread * 8;
      if (feature >= a.features) continue;
      *reinterpret_cast<uint2*>(static_cast<uint8_t*>(p.args.data) + at.row * a.features +
                                feature) =
          encode8<E4M3>(h[i], [&](int) { return scale.quant_multiplier; });
    }
  }
}

// Eight gate gradients and eight up gradients, stored as the row is laid out.
template <typename T>
__device__ __forceinline__ void store_pair(const GateArgs& a, T* row, int64_t feature,
                                           const Vec8<T>& d_gate, const Vec8<T>& d_up) {
  if (!a.interleaved) {
    store8(row + feature, d_gate);
    store8(row + a.features + feature, d_up);
    return;
  }
  Vec8<T> mixed[2];
#pragma unroll
  for (int j = 0; j < 8; ++j) set_pair(mixed[j / 4], j % 4, d_gate.get(j), d_up.get(j));
  store8(row + 2 * feature, mixed[0]);
  store8(row + 2 * feature + 8, mixed[1]);
}

__device__ __forceinline__ void store_codes(const GateArgs& a, uint8_t* row, int64_t feature,
                                            uint2 d_gate, uint2 d_up) {
  if (!a.interleaved) {
    *reinterpret_cast<uint2*>(row + feature) = d_gate;
    *reinterpret_cast<uint2*>(row + a.features + feature) = d_up;
    return;
  }
  *reinterpret_cast<uint4*>(row + 2 * feature) =
      make_uint4(__byte_perm(d_gate.x, d_up.x, 0x5140), __byte_perm(d_gate.x, d_up.x, 0x7362),
                 __byte_perm(d_gate.y, d_up.y, 0x5140), __byte_perm(d_gate.y, d_up.y, 0x7362));
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(512, 1) gate_backward_kernel(const BackwardParams p) {
  __shared__ uint32_t warp_amax[16];
  __shared__ float warp_dot[16];
  const GateBackwardArgs& b = p.args;
  const GateArgs& a = b.gate;
  const Place at = place_of(a, p.plan);
  const int group = at.exists && a.bias != nullptr ? group_of(a.offsets, a.groups, at.row) : 0;
  const int64_t stride = static_cast<int64_t>(p.plan.threads_per_row) * 8;
  const int slot = at.exists ? __ldg(b.source + at.row) : 0;
  const float weight = at.exists ? __ldg(b.weights + slot) : 0.0F;

  Vec8<T> d_gate[kVectors];
  Vec8<T> d_up[kVectors];
  float dot = 0.0F;
  // First time round also what needs no scale: weighted_h and the gradient of the weight.
  const auto compute = [&](int iteration, bool first) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t feature = (iteration * kVectors + i) * stride + at.thread * 8;
      d_gate[i] = zero8<T>();
      d_up[i] = zero8<T>();
      if (!at.exists || feature >= a.features) continue;
      const GateValues g = load_biased<T>(a, at.row, group, feature);
      const int64_t in_h = at.row * a.features + feature;
      const Vec8<T> dh = load8(static_cast<const T*>(b.dh) + in_h, 8, true);
      Vec8<T> h;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Unit low = gated_unit<true>(a, g.gate[2 * j], g.up[2 * j]);
        const Unit high = gated_unit<true>(a, g.gate[2 * j + 1], g.up[2 * j + 1]);
        const float d_low = weight * dh.get(2 * j);
        const float d_high = weight * dh.get(2 * j + 1);
        set_pair(d_gate[i], j, d_low * low.d_gate, d_high * high.d_gate);
        set_pair(d_up[i], j, d_low * low.d_up, d_high * high.d_up);
        set_pair(h, j, low.h, high.h);
      }
      if (first) {
        Vec8<T> weighted;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          dot += dh.get(2 * j) * h.get(2 * j) + dh.get(2 * j + 1) * h.get(2 * j + 1);
          set_pair(weighted, j, weight * h.get(2 * j), weight * h.get(2 * j + 1));
        }
        if (b.weighted_h != nullptr) store8(static_cast<T*>(b.weighted_h) + in_h, weighted);
      }
    }
  };

  PackedAmax<T> amax;
  amax.clear();
  for (int iteration = 0; iteration < p.plan.iterations; ++iteration) {
    compute(iteration, true);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      amax.update(d_gate[i]);
      amax.update(d_up[i]);
    }
  }
  dot = warp_sum(dot);
  if (threadIdx.x % 32 == 0) warp_dot[threadIdx.x / 32] = dot;
  const uint32_t bits = row_max(amax.max_float_bits(), p.plan, at.slot, warp_amax);
  const GroupScale scale = scale_from_amax(bits, E4M3::kMax);
  if (!at.exists) return;
  if (at.thread == 0) {
    if (b.data != nullptr) b.scale[at.row] = scale.scale;
    if (b.d_weights != nullptr) {
      const int warps = p.plan.threads_per_row / 32;
      // A warp that has a row to itself wrote its own sum; else row_max had a barrier.
      float sum = warps == 1 ? dot : 0.0F;
      for (int w = 0; warps > 1 && w < warps; ++w) sum += warp_dot[at.slot * warps + w];
      b.d_weights[slot] = sum;
    }
  }
  for (int iteration = 0; iteration < p.plan.iterations; ++iteration) {
    if (p.plan.iterations > 1) compute(iteration, false);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t feature = (iteration * kVectors + i) * stride + at.thread * 8;
      if (feature >= a.features) continue;
      if (b.d_gate_up != nullptr) {
        store_pair(a, static_cast<T*>(b.d_gate_up) + at.row * 2 * a.features, feature, d_gate[i],
                   d_up[i]);
      }
      if (b.data != nullptr) {
        const auto multiplier = [&](int) { return scale.quant_multiplier; };
        store_codes(a, static_cast<uint8_t*>(b.data) + at.row * 2 * a.features, feature,
                    encode8<E4M3>(d_gate[i], multiplier), encode8<E4M3>(d_up[i], multiplier));
      }
    }
  }
}

void check_gate(const GateArgs& a) {
  require(a.rows > 0 && a.features > 0 && a.features % 16 == 0,
          "gated activations take rows, and features in sixteens");
  require(on_16_bytes(a.gate_up) && on_16_bytes(a.bias),
          "gated activations expect 16-byte aligned rows");
}

template <typename Launch>
void with_vectors(int vectors, const Launch& go) {
  switch (vectors) {
    case 1:
      return go(std::integral_constant<int, 1>{});
    case 2:
      return go(std::integral_constant<int, 2>{});
    default:
      return go(std::integral_constant<int, kMaxVectors>{});
  }
}

template <typename Params, typename Kernels>
void launch_gate(const GateArgs& gate, const Params& params, Stream stream,
                 const Kernels& kernels) {
  const int threads = params.plan.threads_per_row * params.plan.rows_per_block;
  const auto blocks = static_cast<unsigned>(ceil_div(gate.rows, params.plan.rows_per_block));
  dispatch_input(gate.dtype, [&](auto input) {
    with_vectors(params.plan.vectors, [&](auto vectors) {
      launch(kernels(input, vectors), blocks, threads, stream, params);
    });
  });
}

}  // namespace

void gate_forward(const GateForwardArgs& args, Stream stream) {
  check_gate(args.gate);
  require(on_16_bytes(args.data) && args.scale != nullptr, "gate_forward expects destinations");
  launch_gate(args.gate, ForwardParams{args, plan_gate(args.gate.features)}, stream,
              [](auto input, auto vectors) {
                return gate_forward_kernel<typename decltype(input)::type, vectors()>;
              });
}

void gate_backward(const GateBackwardArgs& args, Stream stream) {
  check_gate(args.gate);
  require(on_16_bytes(args.data) && on_16_bytes(args.d_gate_up) && on_16_bytes(args.weighted_h) &&
              on_16_bytes(args.dh),
          "gate_backward expects 16-byte aligned rows");
  launch_gate(args.gate, BackwardParams{args, plan_gate(args.gate.features)}, stream,
              [](auto input, auto vectors) {
                return gate_backward_kernel<typename decltype(input)::type, vectors()>;
              });
}

}  // namespace fp8::core
