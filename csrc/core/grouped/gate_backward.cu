// The gated activation's backward, with quantization, one pass: a row of gates, ups and dh is read
// once, what needs no scale leaves at once, and when the row's amax is known its codes. In between
// the gradients wait in shared memory, each thread's own, which leaves registers for the formulas
// of enough threads. A row that does not fit there is computed twice. Rows past the last offset are
// left alone. Bound by bandwidth: 4 + 2 + 2 + 4 + 2 bytes a feature (bf16).
#include "core/grouped/gated.cuh"
#include "core/quantize/computed_row.cuh"

namespace fp8::core {
namespace {

// Of eight features a thread, before a row has more threads: the order in which dot products are
// added hangs on it.
constexpr int kMaxVectors = 2;
constexpr int kBlockThreads = 256;

template <typename Source>
struct BackwardParams {
  Source source;
  GateBackwardArgs args;
  RowwisePlan plan;
  int vectors;  // of eight features a thread
};

// Stored as a row of gates and ups is laid out.
template <bool kPlain, typename T>
__device__ __forceinline__ void store_pair(const GateArgs& a, T* row, int64_t feature,
                                           const GatePair<T>& d) {
  if (kPlain || !a.interleaved) {
    store8(row + feature, d.gate);
    store8(row + a.features + feature, d.up);
    return;
  }
  Vec8<T> low;
  Vec8<T> high;
  interleave(d, low, high);
  store8(row + 2 * feature, low);
  store8(row + 2 * feature + 8, high);
}

template <bool kPlain>
__device__ __forceinline__ void store_codes(const GateArgs& a, uint8_t* row, int64_t feature,
                                            uint2 d_gate, uint2 d_up) {
  if (kPlain || !a.interleaved) {
    *reinterpret_cast<uint2*>(row + feature) = d_gate;
    *reinterpret_cast<uint2*>(row + a.features + feature) = d_up;
    return;
  }
  *reinterpret_cast<uint4*>(row + 2 * feature) =
      make_uint4(__byte_perm(d_gate.x, d_up.x, 0x5140), __byte_perm(d_gate.x, d_up.x, 0x7362),
                 __byte_perm(d_gate.y, d_up.y, 0x5140), __byte_perm(d_gate.y, d_up.y, 0x7362));
}

// What a backward makes of eight features.
template <typename T>
struct Results {
  GatePair<T> d;  // weight * dh * the unit's derivatives
  Vec8<T> weighted_h;
};

// dot: dh . h is added to it.
template <typename T, bool kPlain>
__device__ __forceinline__ Results<T> results(const GatedSource<T, kPlain>& source,
                                              const typename GatedSource<T, kPlain>::Values& v,
                                              const Vec8<T>& dh, float weight, float& dot) {
  Results<T> out;
  source.in_its_form(v, [&](auto activation, auto fast) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto unit = [&](int i) {
        return gated_unit<decltype(activation)::value, true, decltype(fast)::value>(
            v.gate(i), v.up(i), source.args.alpha, source.args.limit);
      };
      const GatedUnit low = unit(2 * j);
      const GatedUnit high = unit(2 * j + 1);
      const float d_low = weight * dh.get(2 * j);
      const float d_high = weight * dh.get(2 * j + 1);
      set_pair(out.d.gate, j, d_low * low.d_gate, d_high * high.d_gate);
      set_pair(out.d.up, j, d_low * low.d_up, d_high * high.d_up);
      Vec8<T> h;  // rounded, as the forward had it
      set_pair(h, j, low.h, high.h);
      dot += dh.get(2 * j) * h.get(2 * j) + dh.get(2 * j + 1) * h.get(2 * j + 1);
      set_pair(out.weighted_h, j, weight * h.get(2 * j), weight * h.get(2 * j + 1));
    }
  });
  return out;
}

// Blocks of 512 threads to a multiprocessor: bf16 in the plain layout fits into 64 registers a
// thread.
template <typename T, bool kPlain, bool kShared>
constexpr int kMinBlocks = std::is_same_v<T, __nv_bfloat16> && kPlain && kShared ? 2 : 1;

// kShared: the block's rows fit into shared memory, [vectors][threads] pairs.
template <typename T, bool kPlain, bool kShared, typename Format>
__global__ void __launch_bounds__(kMaxRowThreads, kMinBlocks<T, kPlain, kShared>)
    gate_backward_kernel(const BackwardParams<GatedSource<T, kPlain>> p) {
  extern __shared__ uint4 waiting[];
  __shared__ uint32_t warp_amax[kMaxRowThreads / 32];
  __shared__ float warp_dot[kMaxRowThreads / 32];
  let_next_start();
  const GateBackwardArgs& b = p.args;
  const GateArgs& a = p.source.args;
  const RowPlace at(p.plan);
  const auto row = p.source.row(at.row);
  const auto features = static_cast<int>(p.source.cols_of(at.row));
  const bool exists = features > 0;
  const float weight = exists ? __ldg(b.weights + __ldg(b.source + at.row)) : 0.0F;
  const auto* gate_up = static_cast<const T*>(a.gate_up);  // indexed as d_gate_up: fewer registers
  const auto place = [&](int i) {
    return reinterpret_cast<GatePair<T>*>(waiting) + i * blockDim.x + threadIdx.x;
  };

  float dot = 0.0F;
  // First time round also what needs no scale. d_gate_up may lie where gate_up does: a row that is
  // computed twice stores it the second time.
  const auto compute = [&](int feature, bool first) {
    const int64_t in_h = at.row * a.features + feature;
    const Vec8<T> dh = load8(static_cast<const T*>(b.dh) + in_h, 8, true);
    const Results<T> found = results<T, kPlain>(
        p.source, p.source.values({gate_up + at.row * 2 * a.features, row.bias}, feature), dh,
        weight, dot);
    if (first && b.weighted_h != nullptr) {
      store8(static_cast<T*>(b.weighted_h) + in_h, found.weighted_h);
    }
    if (first == kShared && b.d_gate_up != nullptr) {
      store_pair<kPlain>(a, static_cast<T*>(b.d_gate_up) + at.row * 2 * a.features, feature,
                         found.d);
    }
    return found.d;
  };

  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < p.vectors; ++i) {
    const auto feature = (i * p.plan.threads_per_row + at.thread) * 8;
    if (feature >= features) break;
    const GatePair<T> d = compute(feature, true);
    bits = max(bits, max(amax_bits(d.gate), amax_bits(d.up)));
    if constexpr (kShared) *place(i) = d;
  }
  dot = warp_sum(dot);
  if (threadIdx.x % 32 == 0) warp_dot[threadIdx.x / 32] = dot;
  bits = row_max(bits, p.plan, at.slot, warp_amax);
  const GroupScale scale = scale_from_amax(bits, Format::kMax, b.power_of_two);
  if (!exists) return;
  if (at.thread == 0) {
    if (b.data != nullptr) b.scale[at.row] = scale.scale;
    if (b.d_weights != nullptr) {
      const int warps = p.plan.threads_per_row / 32;
      // A warp that has a row to itself wrote its own sum; else row_max had a barrier.
      float sum = warps == 1 ? dot : 0.0F;
      for (int w = 0; warps > 1 && w < warps; ++w) sum += warp_dot[at.slot * warps + w];
      b.d_weights[__ldg(b.source + at.row)] = sum;
    }
  }
  if (kShared && b.data == nullptr) return;
  const auto multiplier = [&](int) { return scale.quant_multiplier; };
#pragma unroll 1
  for (int i = 0; i < p.vectors; ++i) {
    const auto feature = (i * p.plan.threads_per_row + at.thread) * 8;
    if (feature >= features) return;
    const GatePair<T> d = kShared ? *place(i) : compute(feature, false);
    if (b.data == nullptr) continue;
    store_codes<kPlain>(a, static_cast<uint8_t*>(b.data) + at.row * 2 * a.features, feature,
                        encode8<Format>(d.gate, multiplier), encode8<Format>(d.up, multiplier));
  }
}

template <typename T, typename Format, typename Source>
void launch_typed(const Source& source, const GateBackwardArgs& args, Stream stream) {
  const int64_t features = args.gate.features;
  const RowwisePlan plan = plan_rowwise(features, kBlockThreads, kMaxVectors);
  const int threads = plan.threads_per_row * plan.rows_per_block;
  const auto blocks = static_cast<unsigned>(ceil_div(args.gate.rows, plan.rows_per_block));
  const int vectors = static_cast<int>(ceil_div(features / 8, plan.threads_per_row));
  const size_t bytes = sizeof(GatePair<T>) * static_cast<size_t>(vectors) * threads;
  const BackwardParams<Source> params{source, args, plan, vectors};
  const auto kernel = gate_backward_kernel<T, Source::kIsPlain, true, Format>;
  static std::array<std::atomic<int>, kMaxDevices> known{};
  if (bytes <= shared_memory_of(reinterpret_cast<const void*>(kernel), known)) {
    launch(kernel, blocks, threads, stream, params, {.shared_bytes = bytes});
  } else {
    launch(gate_backward_kernel<T, Source::kIsPlain, false, Format>, blocks, threads, stream,
           params);
  }
}

}  // namespace

void gate_backward(const GateBackwardArgs& args, Stream stream) {
  check_gate(args.gate);
  require(on_16_bytes(args.data) && on_16_bytes(args.d_gate_up) && on_16_bytes(args.weighted_h) &&
              on_16_bytes(args.dh),
          "gate_backward expects 16-byte aligned rows");
  dispatch_input(args.gate.dtype, [&](auto input) {
    dispatch_format(args.dtype, [&](auto format) {
      using T = typename decltype(input)::type;
      with_gated_source<T>(args.gate, [&](auto source) {
        launch_typed<T, typename decltype(format)::type>(source, args, stream);
      });
    });
  });
}

}  // namespace fp8::core
