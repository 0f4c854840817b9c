// What a matmul plan depends on, and nothing else: two calls with equal keys run the same
// algorithm. Host logic: no CUDA, tested on any machine.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "fp8/core.h"
#include "host/formats.h"

namespace fp8::core {

// The largest power of two up to 256 that divides an address: what cuBLASLt's heuristic wants to
// know.
inline uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return address == 0 ? 256U : 1U << std::min(std::countr_zero(address), 8);
}

inline Granularity granularity_of_b(const MatmulArgs& args) {
  return args.granularity_b.value_or(args.granularity);
}

inline bool has_block_scales(const MatmulArgs& args) {
  return is_blockwise(args.granularity) || is_blockwise(granularity_of_b(args));
}

// Fast accumulation is no property of products with block scales, whatever is asked for.
inline bool accumulates_fast(const MatmulArgs& args) {
  return args.fast_accum && !has_block_scales(args);
}

struct PlanKey {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t lda = 0;
  int64_t ldb = 0;
  int64_t ldo = 0;
  uint64_t options = 0;     // device, dtypes, granularities, bias, accumulate, fast_accum
  uint64_t alignments = 0;  // of a, b, out, bias

  bool operator==(const PlanKey&) const = default;
};

inline PlanKey make_plan_key(const MatmulArgs& args, int device) {
  const auto bits = [](auto value, int shift) { return static_cast<uint64_t>(value) << shift; };
  PlanKey key{args.m, args.n, args.k, args.lda, args.ldb, args.ldo, 0, 0};
  const bool has_bias = args.bias != nullptr;
  key.options = bits(device, 32) | bits(args.a_dtype, 0) | bits(args.b_dtype, 4) |
                bits(args.out_dtype, 8) | bits(has_bias ? args.bias_dtype : Dtype::kFloat32, 12) |
                bits(args.granularity, 16) | bits(has_bias, 20) | bits(args.accumulate, 21) |
                bits(accumulates_fast(args), 22) | bits(granularity_of_b(args), 24);
  key.alignments = bits(alignment_of(args.a), 0) | bits(alignment_of(args.b), 16) |
                   bits(alignment_of(args.out), 32) | bits(alignment_of(args.bias), 48);
  return key;
}

struct PlanKeyHash {
  size_t operator()(const PlanKey& key) const {
    // Each word is multiplied into the state in turn, so permuted extents do not collide.
    uint64_t state = 0x9E3779B97F4A7C15ULL;
    const auto mix = [&](uint64_t word) {
      state = (state ^ word) * 0xBF58476D1CE4E5B9ULL;
      state ^= state >> 31;
    };
    for (const int64_t word : {key.m, key.n, key.k, key.lda, key.ldb, key.ldo}) {
      mix(static_cast<uint64_t>(word));
    }
    mix(key.options);
    mix(key.alignments);
    return state;
  }
};

}  // namespace fp8::core
