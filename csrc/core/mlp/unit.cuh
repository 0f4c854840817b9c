// An MLP's unit eight features at a time: h as a source of quantize kernels
// (core/quantize/source.cuh), and its gradients.
#pragma once

#include "core/device/dispatch.cuh"
#include "core/mlp/activations.cuh"
#include "core/quantize/source.cuh"

namespace fp8::core {

// f(std::bool_constant): whether fast forms may compute the eight.
template <typename U, typename T, typename F>
__device__ __forceinline__ void in_its_form(const Vec8<T>& gate, const MlpUnitArgs& args,
                                            const F& f) {
  if constexpr (U::kHasFastForm) {
    if (!U::allows_fast(gate, args)) return f(std::false_type{});
  }
  f(std::true_type{});
}

template <typename Act, typename T, bool kGated>
__device__ __forceinline__ Vec8<T> unit_forward_of(const Vec8<T>& gate, const Vec8<T>& up,
                                                   const MlpUnitArgs& args) {
  using U = Unit<Act, T, kGated>;
  Vec8<T> h;
  in_its_form<U>(gate, args, [&](auto fast) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto unit = [&](int i) {
        return U::template h<fast>(gate.get(i), kGated ? up.get(i) : 0.0F, args);
      };
      set_pair(h, j, unit(2 * j), unit(2 * j + 1));
    }
  });
  return h;
}

// An activation that is known as the kernel runs.
struct AnyActivation {};

template <typename T, bool kGated, typename Act = AnyActivation>
__device__ __forceinline__ Vec8<T> unit_forward(const Vec8<T>& gate, const Vec8<T>& up,
                                                const MlpUnitArgs& args) {
  if constexpr (!std::is_same_v<Act, AnyActivation>) {
    return unit_forward_of<Act, T, kGated>(gate, up, args);
  } else {
    Vec8<T> h;
    with_mlp_activation(args.activation, [&](auto activation) {
      h = unit_forward_of<typename decltype(activation)::type, T, kGated>(gate, up, args);
    });
    return h;
  }
}

template <typename T>
struct UnitResults {
  Vec8<T> gate;  // gradients
  Vec8<T> up;
  Vec8<T> h;
};

template <typename Act, typename T, bool kGated>
__device__ __forceinline__ UnitResults<T> unit_backward_of(const Vec8<T>& gate, const Vec8<T>& up,
                                                           const Vec8<T>& dh,
                                                           const MlpUnitArgs& args) {
  using U = Unit<Act, T, kGated>;
  UnitResults<T> out;
  in_its_form<U>(gate, args, [&](auto fast) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto unit = [&](int i) {
        return U::template backward<fast>(gate.get(i), kGated ? up.get(i) : 0.0F, dh.get(i), args);
      };
      const UnitGradients low = unit(2 * j);
      const UnitGradients high = unit(2 * j + 1);
      set_pair(out.gate, j, low.gate, high.gate);
      set_pair(out.up, j, low.up, high.up);
      set_pair(out.h, j, low.h, high.h);
    }
  });
  return out;
}

template <typename T, bool kGated, typename Act = AnyActivation>
__device__ __forceinline__ UnitResults<T> unit_backward(const Vec8<T>& gate, const Vec8<T>& up,
                                                        const Vec8<T>& dh,
                                                        const MlpUnitArgs& args) {
  if constexpr (!std::is_same_v<Act, AnyActivation>) {
    return unit_backward_of<Act, T, kGated>(gate, up, dh, args);
  } else {
    UnitResults<T> out;
    with_mlp_activation(args.activation, [&](auto activation) {
      out = unit_backward_of<typename decltype(activation)::type, T, kGated>(gate, up, dh, args);
    });
    return out;
  }
}

// f(Type<T>, std::bool_constant<kGated>, Type<Act>) of a unit. Gated silu in 16 bits, what most
// models have, gets kernels of its own, which need fewer registers.
template <typename F>
void with_unit_kind(const MlpUnitArgs& unit, const F& f) {
  dispatch_input(unit.dtype, [&](auto input) {
    using T = typename decltype(input)::type;
    if (unit.up == nullptr) return f(input, std::false_type{}, Type<AnyActivation>{});
    if constexpr (sizeof(T) == 2) {
      if (unit.activation == MlpActivation::kSilu) {
        return f(input, std::true_type{}, Type<Silu>{});
      }
    }
    f(input, std::true_type{}, Type<AnyActivation>{});
  });
}

// What a backward reads gate and up as: elements of T, or e4m3 codes of them.
template <typename Element_, bool kIsGated, bool kAreCodes>
struct UnitReads {
  using Element = Element_;
  static constexpr bool kGated = kIsGated;
  static constexpr bool kCodes = kAreCodes;
};

// Codes are read in one kind alone: the memory that they save is wanted by large models, nearly all
// of which have it, and each kind is a tenth of what the kernels of a backward take to compile.
inline bool reads_codes(const MlpUnitArgs& unit) {
  return unit.up != nullptr && unit.dtype == Dtype::kBFloat16 &&
         unit.activation == MlpActivation::kSilu;
}

// f(UnitReads, Type<Act>) of a unit.
template <typename F>
void with_unit_reads(const MlpUnitArgs& unit, const F& f) {
  if (unit.gate_scale != nullptr) {
    require(reads_codes(unit), "an MLP's unit expects codes of a gated silu in bf16");
    return f(UnitReads<__nv_bfloat16, true, true>{}, Type<Silu>{});
  }
  with_unit_kind(unit, [&](auto input, auto gated, auto activation) {
    f(UnitReads<typename decltype(input)::type, decltype(gated)::value, false>{}, activation);
  });
}

// code * scale of eight e4m3 codes, rounded to T: as core::dequantize has them.
template <typename T>
__device__ __forceinline__ Vec8<T> decode8(uint2 codes, float scale) {
  Vec8<T> v;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const uint32_t word = pair < 2 ? codes.x : codes.y;
    const auto two = static_cast<__nv_fp8x2_storage_t>(word >> (16 * (pair % 2)) & 0xFFFFU);
    const float2 x = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
    set_pair(v, pair, x.x * scale, x.y * scale);
  }
  return v;
}

template <typename T>
struct UnitInputs {
  Vec8<T> gate;
  Vec8<T> up;
  Vec8<T> dh;
};

// Eight features of a row, which exist; dh: [rows, features], or nullptr for zeros.
template <typename Reads, typename T = typename Reads::Element>
__device__ __forceinline__ UnitInputs<T> fetch_unit(const MlpUnitArgs& unit, const void* dh,
                                                    int64_t dh_ld, int64_t row, int64_t col) {
  const int64_t at = row * unit.ld + col;
  const auto fetch = [&](const void* from, [[maybe_unused]] const float* scale) {
    if constexpr (Reads::kCodes) {
      const auto* codes = reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(from) + at);
      return decode8<T>(__ldg(codes), __ldg(scale + row));
    } else {
      return load8(static_cast<const T*>(from) + at, 8, true);
    }
  };
  UnitInputs<T> in;
  in.gate = fetch(unit.gate, unit.gate_scale);
  if constexpr (Reads::kGated) in.up = fetch(unit.up, unit.up_scale);
  in.dh =
      dh == nullptr ? zero8<T>() : load8(static_cast<const T*>(dh) + row * dh_ld + col, 8, true);
  return in;
}

// h of [rows, features].
template <typename T, bool kGated, typename Act>
struct UnitSource {
  using Element = T;
  static constexpr bool kIsGated = kGated;
  static constexpr int kMinBlocks = sizeof(T) == 4 ? 1 : std::is_same_v<Act, AnyActivation> ? 3 : 4;
  static constexpr int kBlockwiseMinBlocks = sizeof(T) == 4 ? 1 : 2;
  MlpUnitArgs args;

  __device__ __forceinline__ int64_t cols_of(int64_t index) const {
    return index < args.rows ? args.features : 0;
  }
  // A row that is not there is fetched, too: without a branch around it, fetches run ahead.
  __device__ __forceinline__ int64_t row(int64_t index) const {
    return index < args.rows ? index * args.ld : 0;
  }
  struct Raw {
    Vec8<T> gate;
    Vec8<T> up;
  };
  __device__ __forceinline__ Raw fetch(int64_t row, int64_t col) const {
    const int64_t at = row + min(col, args.features - 8);
    Raw raw;
    raw.gate = load8(static_cast<const T*>(args.gate) + at, 8, true);
    if constexpr (kGated) raw.up = load8(static_cast<const T*>(args.up) + at, 8, true);
    return raw;
  }
  static constexpr int kParts = kGated ? 2 : 1;  // gate, up
  __device__ __forceinline__ const T* part(int64_t row, int which, int64_t col) const {
    return static_cast<const T*>(which == 0 ? args.gate : args.up) + row + col;
  }
  __device__ __forceinline__ Raw of_parts(int64_t /*row*/, int64_t /*col*/,
                                          const Vec8<T> (&parts)[kParts]) const {
    return {parts[0], parts[kParts - 1]};
  }
  // All eight are there, or none: features come in sixteens.
  __device__ __forceinline__ Vec8<T> finish(const Raw& raw, int valid) const {
    return valid > 0 ? unit_forward<T, kGated, Act>(raw.gate, raw.up, args) : zero8<T>();
  }
  __device__ __forceinline__ Vec8<T> load(int64_t row, int64_t col, int valid) const {
    return finish(fetch(row, col), valid);
  }
};

// f(source) with the source of h of these arguments.
template <typename F>
void with_unit_source(const MlpUnitArgs& unit, const F& f) {
  with_unit_kind(unit, [&](auto input, auto gated, auto activation) {
    f(UnitSource<typename decltype(input)::type, decltype(gated)::value,
                 typename decltype(activation)::type>{unit});
  });
}

}  // namespace fp8::core
