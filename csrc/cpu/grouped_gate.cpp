// Gated activations of the experts, forward and backward (grouped/gate.cu on the CPU).
#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "cpu/grouped.h"
#include "cpu/grouped_rows.h"

namespace fp8::cpu {
namespace {

// Value and derivatives of one gated unit, as grouped/gate.cu has them.
struct Unit {
  float h;
  float d_gate;
  float d_up;
};

float sigmoid(float x) { return 1.0F / (1.0F + std::exp(-x)); }

Unit gated_unit(const core::GateArgs& a, float gate, float up) {
  float act = 0.0F;
  float d_act = 0.0F;
  float factor = up;
  float d_factor = 1.0F;
  switch (a.activation) {
    case core::Activation::kSilu: {
      const float s = sigmoid(gate);
      act = gate * s;
      d_act = s * (1.0F + gate * (1.0F - s));
      break;
    }
    case core::Activation::kGelu: {
      const float cdf = 0.5F * (1.0F + std::erf(gate * 0.70710678F));
      act = gate * cdf;
      d_act = cdf + gate * 0.39894228F * std::exp(-0.5F * gate * gate);
      break;
    }
    case core::Activation::kGeluTanh: {
      const float inner = 0.79788456F * (gate + 0.044715F * gate * gate * gate);
      const float t = std::tanh(inner);
      act = 0.5F * gate * (1.0F + t);
      d_act = 0.5F * (1.0F + t) +
              0.5F * gate * (1.0F - t * t) * 0.79788456F * (1.0F + 3.0F * 0.044715F * gate * gate);
      break;
    }
    case core::Activation::kClampedSilu: {
      const bool passes = !(gate > a.limit);
      const float clamped = passes ? gate : a.limit;
      const float s = sigmoid(a.alpha * clamped);
      act = clamped * s;
      if (passes) d_act = s * (1.0F + a.alpha * clamped * (1.0F - s));
      const bool inside = !(up > a.limit) && !(up < -a.limit);
      factor = (inside ? up : up > 0.0F ? a.limit : -a.limit) + 1.0F;
      d_factor = inside ? 1.0F : 0.0F;
      break;
    }
  }
  return {act * factor, d_act * factor, act * d_factor};
}

// Rows of gates and ups, with their bias; gate(i) and up(i) know the layout.
struct GateRow {
  const core::GateArgs& a;
  std::vector<float> values = std::vector<float>(2 * a.features);
  std::vector<float> bias = std::vector<float>(a.bias != nullptr ? 2 * a.features : 0);

  void load(int64_t row) {
    read(a.gate_up, a.dtype, row * 2 * a.features, 2 * a.features, values.data());
    if (a.bias == nullptr) return;
    const int64_t group = group_of(a.offsets, a.groups, row);
    read(a.bias, a.dtype, group * 2 * a.features, 2 * a.features, bias.data());
    for (int64_t i = 0; i < 2 * a.features; ++i) values[i] += bias[i];
  }
  int64_t gate_at(int64_t i) const { return a.interleaved ? 2 * i : i; }
  int64_t up_at(int64_t i) const { return a.interleaved ? 2 * i + 1 : a.features + i; }
  Unit unit(int64_t i) const { return gated_unit(a, values[gate_at(i)], values[up_at(i)]); }
};

}  // namespace

void gate_forward(const core::GateForwardArgs& args) {
  const core::GateArgs& a = args.gate;
  const int64_t rows = grouped_rows(a.offsets, a.groups, a.rows);
  at::parallel_for(0, rows, grain(2 * a.features), [&](int64_t begin, int64_t end) {
    GateRow row{a};
    std::vector<float> h(a.features);
    for (int64_t r = begin; r < end; ++r) {
      row.load(r);
      for (int64_t i = 0; i < a.features; ++i) h[i] = rounded(row.unit(i).h, a.dtype);
      args.scale[r] =
          quantize_row(h.data(), a.features, args.data, r * a.features, args.power_of_two);
    }
  });
}

void gate_backward(const core::GateBackwardArgs& args) {
  const core::GateArgs& a = args.gate;
  const int64_t rows = grouped_rows(a.offsets, a.groups, a.rows);
  at::parallel_for(0, rows, grain(2 * a.features), [&](int64_t begin, int64_t end) {
    GateRow row{a};
    std::vector<float> dh(a.features);
    std::vector<float> weighted(a.features);
    std::vector<float> d(2 * a.features);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t slot = args.source[r];
      const float weight = args.weights[slot];
      row.load(r);
      read(args.dh, a.dtype, r * a.features, a.features, dh.data());
      float dot = 0.0F;
      for (int64_t i = 0; i < a.features; ++i) {
        const Unit unit = row.unit(i);
        const float h = rounded(unit.h, a.dtype);
        d[row.gate_at(i)] = rounded(weight * dh[i] * unit.d_gate, a.dtype);
        d[row.up_at(i)] = rounded(weight * dh[i] * unit.d_up, a.dtype);
        dot += dh[i] * h;
        weighted[i] = weight * h;
      }
      if (args.d_weights != nullptr) args.d_weights[slot] = dot;
      const int64_t place = r * 2 * a.features;
      if (args.data != nullptr) {
        args.scale[r] = quantize_row(d.data(), 2 * a.features, args.data, place, args.power_of_two);
      }
      if (args.d_gate_up != nullptr) {
        write(args.d_gate_up, a.dtype, place, 2 * a.features, d.data());
      }
      if (args.weighted_h != nullptr) {
        write(args.weighted_h, a.dtype, r * a.features, a.features, weighted.data());
      }
    }
  });
}

}  // namespace fp8::cpu
