// What the C++ tests of an MLP's passes share: elements of 16 bits, and an MLP's unit without
// quantization.
#pragma once

#include <cstring>
#include <vector>

#include "device_memory.h"
#include "fp8/core_mlp.h"

using Bits = std::vector<uint16_t>;  // bf16 or fp16

inline float from_bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value = 0;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}
inline uint16_t to_bf16(float value) {  // rounded towards zero
  uint32_t word = 0;
  std::memcpy(&word, &value, sizeof(word));
  return static_cast<uint16_t>(word >> 16);
}
inline Bits random_bf16(int64_t count, unsigned seed, float scale = 1) {
  Bits bits(count);
  const std::vector<float> values = random_matrix(count, seed);
  for (int64_t i = 0; i < count; ++i) bits[i] = to_bf16(values[i] * scale);
  return bits;
}

struct Values {
  Bits d_gate, d_up, h;
};

// Of [rows, features]; up empty: plain.
inline Values values_of(const Bits& gate, const Bits& up, const Bits& dh, int64_t features,
                        fp8::core::Dtype dtype = fp8::core::Dtype::kBFloat16,
                        fp8::core::MlpActivation activation = fp8::core::MlpActivation::kSilu) {
  const auto count = static_cast<int64_t>(gate.size());
  const Buffer<uint16_t> g(gate);
  const Buffer<uint16_t> u(up.empty() ? gate : up);
  const Buffer<uint16_t> d(dh);
  const Buffer<uint16_t> d_gate(count);
  const Buffer<uint16_t> d_up(count);
  const Buffer<uint16_t> h(count);
  fp8::core::mlp_values({.unit = {.gate = g.data,
                                  .up = up.empty() ? nullptr : u.data,
                                  .dtype = dtype,
                                  .rows = count / features,
                                  .features = features,
                                  .ld = features,
                                  .activation = activation},
                         .dh = d.data,
                         .dh_ld = features,
                         .d_gate = d_gate.data,
                         .d_up = up.empty() ? nullptr : d_up.data,
                         .d_ld = features,
                         .h = h.data,
                         .h_ld = features},
                        nullptr);
  check(cudaDeviceSynchronize());
  return {d_gate.host(), up.empty() ? Bits{} : d_up.host(), h.host()};
}
