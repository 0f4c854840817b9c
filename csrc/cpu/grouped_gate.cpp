// Gated activations of the experts, forward and backward (grouped/gate_*.cu on the CPU).
#include <ATen/Parallel.h>

#include <vector>

#include "cpu/grouped.h"
#include "cpu/grouped_rows.h"
#include "host/gate.h"

namespace fp8::cpu {
namespace {

// Rows of gates and ups, with their bias; gate(i) and up(i) know the layout.
struct GateRow {
  const core::GateArgs& a;
  std::vector<float> values = std::vector<float>(2 * a.features);
  std::vector<float> bias = std::vector<float>(a.bias != nullptr ? 2 * a.features : 0);

  void load(int64_t row) {
    read(a.gate_up, a.dtype, row * 2 * a.features, 2 * a.features, values.data());
    if (a.bias == nullptr) return;
    const int64_t group = a.offsets == nullptr ? 0 : group_of(a.offsets, a.groups, row);
    read(a.bias, a.dtype, group * 2 * a.features, 2 * a.features, bias.data());
    for (int64_t i = 0; i < 2 * a.features; ++i) values[i] += bias[i];
  }
  int64_t gate_at(int64_t i) const { return a.interleaved ? 2 * i : i; }
  int64_t up_at(int64_t i) const { return a.interleaved ? 2 * i + 1 : a.features + i; }
  // f(i, unit) of each feature.
  template <typename F>
  void for_units(const F& f) const {
    with_activation(a.activation, [&](auto activation) {
      for (int64_t i = 0; i < a.features; ++i) {
        f(i, gated_unit<decltype(activation)::value, true>(values[gate_at(i)], values[up_at(i)],
                                                           a.alpha, a.limit));
      }
    });
  }
};

}  // namespace

void gate_forward(const core::GateForwardArgs& args) {
  const core::GateArgs& a = args.gate;
  const int64_t rows = grouped_rows(a.offsets, a.groups, a.rows);
  at::parallel_for(0, rows, grain(2 * a.features), [&](int64_t begin, int64_t end) {
    GateRow row{a};
    std::vector<float> h(a.features);
    const int64_t block = scaled_together(args.granularity, a.features);
    for (int64_t r = begin; r < end; ++r) {
      row.load(r);
      row.for_units([&](int64_t i, const GatedUnit& unit) { h[i] = rounded(unit.h, a.dtype); });
      quantize_blocks(h.data(), a.features, block,
                      static_cast<uint8_t*>(args.data) + r * a.features, args.scale + r, a.rows,
                      {args.dtype, args.power_of_two});
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
      row.for_units([&](int64_t i, const GatedUnit& unit) {
        const float h = rounded(unit.h, a.dtype);
        d[row.gate_at(i)] = rounded(weight * dh[i] * unit.d_gate, a.dtype);
        d[row.up_at(i)] = rounded(weight * dh[i] * unit.d_up, a.dtype);
        dot += dh[i] * h;
        weighted[i] = weight * h;
      });
      if (args.d_weights != nullptr) args.d_weights[slot] = dot;
      const int64_t place = r * 2 * a.features;
      if (args.data != nullptr) {
        args.scale[r] = quantize_row(d.data(), 2 * a.features, args.data, place,
                                     {args.dtype, args.power_of_two});
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
