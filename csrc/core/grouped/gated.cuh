// Rows of a gated activation as a source of quantize kernels (core/quantize/source.cuh): h =
// act(gate) * up, computed in fp32 eight features at a time and rounded to the input's dtype, as an
// activation module would.
#pragma once

#include "core/device/fast_sigmoid.cuh"
#include "core/grouped/device.cuh"
#include "core/quantize/source.cuh"
#include "host/gate.h"

namespace fp8::core {

// Gates and ups of eight features, or their gradients.
template <typename T>
struct GatePair {
  Vec8<T> gate;
  Vec8<T> up;
};

// Words of pairs (gate, up) become words of gates and words of ups, and back.
template <typename T>
__device__ __forceinline__ GatePair<T> separate(const Vec8<T>& low, const Vec8<T>& high) {
  constexpr int kHalf = Vec8<T>::kWords / 2;
  GatePair<T> pair;
#pragma unroll
  for (int i = 0; i < Vec8<T>::kWords; ++i) {
    const Vec8<T>& from = i < kHalf ? low : high;
    const uint32_t first = from.words[2 * (i % kHalf)];
    const uint32_t second = from.words[2 * (i % kHalf) + 1];
    pair.gate.words[i] = sizeof(T) == 4 ? first : __byte_perm(first, second, 0x5410);
    pair.up.words[i] = sizeof(T) == 4 ? second : __byte_perm(first, second, 0x7632);
  }
  return pair;
}
template <typename T>
__device__ __forceinline__ void interleave(const GatePair<T>& pair, Vec8<T>& low, Vec8<T>& high) {
  constexpr int kHalf = Vec8<T>::kWords / 2;
#pragma unroll
  for (int i = 0; i < Vec8<T>::kWords; ++i) {
    Vec8<T>& to = i < kHalf ? low : high;
    const uint32_t gate = pair.gate.words[i];
    const uint32_t up = pair.up.words[i];
    to.words[2 * (i % kHalf)] = sizeof(T) == 4 ? gate : __byte_perm(gate, up, 0x5410);
    to.words[2 * (i % kHalf) + 1] = sizeof(T) == 4 ? up : __byte_perm(gate, up, 0x7632);
  }
}

// Eight features from a row of any layout.
template <typename T>
__device__ __forceinline__ GatePair<T> load_gate(const GateArgs& a, const T* row, int64_t feature) {
  if (a.interleaved) {
    return separate(load8(row + 2 * feature, 8, true), load8(row + 2 * feature + 8, 8, true));
  }
  return {load8(row + feature, 8, true), load8(row + a.features + feature, 8, true)};
}

// kPlain: without a bias, gates before ups.
template <typename T, bool kPlain>
struct GatedSource {
  using Element = T;
  static constexpr bool kIsPlain = kPlain;
  GateArgs args;

  struct Row {
    const T* values;
    const T* bias;  // of its group, or nullptr
  };
  struct Values {
    GatePair<T> values;
    GatePair<T> bias;
    bool has_bias;
    __device__ __forceinline__ float gate(int i) const {
      const float value = values.gate.get(i);
      return !kPlain && has_bias ? value + bias.gate.get(i) : value;
    }
    __device__ __forceinline__ float up(int i) const {
      const float value = values.up.get(i);
      return !kPlain && has_bias ? value + bias.up.get(i) : value;
    }
  };
  using Raw = Values;

  __device__ __forceinline__ int64_t cols_of(int64_t index) const {
    return index < grouped_rows(args.offsets, args.groups, args.rows) ? args.features : 0;
  }

  __device__ __forceinline__ int64_t width() const { return args.features; }

  __device__ __forceinline__ Row row(int64_t index) const {
    const int64_t width = 2 * args.features;
    const bool exists = cols_of(index) > 0;
    const T* bias = kPlain ? nullptr : static_cast<const T*>(args.bias);
    if (bias != nullptr && exists && args.offsets != nullptr) {
      bias += group_of(args.offsets, args.groups, index) * width;
    }
    // A row that is nobody's lies in memory all the same.
    return {static_cast<const T*>(args.gate_up) + min(index, args.rows - 1) * width, bias};
  }

  // Gates and ups, or two eights of both.
  static constexpr int kParts = 2;
  __device__ __forceinline__ const T* part(const Row& row, int which, int64_t feature) const {
    if (kPlain || !args.interleaved) return row.values + which * args.features + feature;
    return row.values + 2 * feature + 8 * which;
  }
  __device__ __forceinline__ Raw of_parts(const Row& row, int64_t feature,
                                          const Vec8<T> (&parts)[kParts]) const {
    Values v;
    if constexpr (kPlain) {
      v.values = {parts[0], parts[1]};
    } else {
      v.values = args.interleaved ? separate(parts[0], parts[1]) : GatePair<T>{parts[0], parts[1]};
      v.has_bias = row.bias != nullptr;
      if (v.has_bias) v.bias = load_gate(args, row.bias, feature);
    }
    return v;
  }
  __device__ __forceinline__ Values values(const Row& row, int64_t feature) const {
    return of_parts(row, feature,
                    {load8(part(row, 0, feature), 8, true), load8(part(row, 1, feature), 8, true)});
  }

  __device__ __forceinline__ Raw fetch(const Row& row, int64_t feature) const {
    return values(row, min(feature, args.features - 8));
  }

  __device__ __forceinline__ Vec8<T> load(const Row& row, int64_t feature, int valid) const {
    return finish(fetch(row, feature), valid);
  }

  // f(std::integral_constant<Activation, ..>, std::bool_constant<..>): the activation, and whether
  // the fast form of the sigmoid may compute the eight.
  template <typename F>
  __device__ __forceinline__ void in_its_form(const Values& v, const F& f) const {
    const auto choose = [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      if constexpr (has_sigmoid(kActivation)) {
        bool fast = true;
        if constexpr (kPlain && kActivation == Activation::kSilu) {
          fast = none_below_fast(v.values.gate);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float x = sigmoid_argument<kActivation>(v.gate(i), args.alpha, args.limit);
            fast = fast && !(x < kLeastFast);
          }
        }
        if (fast) return f(activation, std::true_type{});
      }
      f(activation, std::false_type{});
    };
    with_activation(args.activation, choose);
  }

  // All eight are there: features come in sixteens.
  __device__ __forceinline__ Vec8<T> finish(const Raw& v, int /*valid*/) const {
    Vec8<T> h;
    in_its_form(v, [&](auto activation, auto fast) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto unit = [&](int i) {
          return gated_unit<decltype(activation)::value, false, decltype(fast)::value>(
              v.gate(i), v.up(i), args.alpha, args.limit);
        };
        set_pair(h, j, unit(2 * j).h, unit(2 * j + 1).h);
      }
    });
    return h;
  }
};

// f(source) with the source of these arguments in elements of T.
template <typename T, typename F>
void with_gated_source(const GateArgs& args, const F& f) {
  if (args.bias == nullptr && !args.interleaved) {
    f(GatedSource<T, true>{args});
  } else {
    f(GatedSource<T, false>{args});
  }
}

}  // namespace fp8::core
