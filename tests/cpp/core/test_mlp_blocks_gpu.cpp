// An MLP's backward with scales of blocks, on a GPU without torch: what core::quantize makes of the
// same gradients and h.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "device_memory.h"
#include "fp8/core_mlp.h"
#include "mlp_problem.h"

using namespace fp8::core;

namespace {

// Destinations of one matrix, both ways, filled with what no kernel leaves.
struct Blocks {
  int64_t rows, cols;  // padded
  Buffer<uint8_t> data, data_t;
  Buffer<float> scale, scale_t;

  Blocks(int64_t true_rows, int64_t true_cols)
      : rows(pad16(true_rows)),
        cols(true_cols),
        data(std::vector<uint8_t>(rows * cols, 0xA5)),
        data_t(std::vector<uint8_t>(rows * cols, 0xA5)),
        scale(std::vector<float>(blocks_of(cols) * rows, -1.0F)),
        scale_t(std::vector<float>(blocks_of(rows) * cols, -1.0F)) {}

  void check_same(const Blocks& other, bool by_rows) const {
    if (by_rows) {
      REQUIRE(data.host() == other.data.host());
      check_scales(scale.host(), other.scale.host());
    }
    REQUIRE(data_t.host() == other.data_t.host());
    check_scales(scale_t.host(), other.scale_t.host());
  }

 private:
  static void check_scales(const std::vector<float>& a, const std::vector<float>& b) {
    REQUIRE(std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
      return x == y || (std::isnan(x) && std::isnan(y));
    }));
  }
};

void quantize_blocks(const Bits& of, int64_t rows, bool power_of_two, const Blocks& to) {
  const Buffer<uint16_t> x(of);
  quantize({.x = x.data,
            .x_dtype = Dtype::kBFloat16,
            .rows = rows,
            .cols = to.cols,
            .ld = to.cols,
            .granularity = Granularity::kBlock1x128,
            .power_of_two = power_of_two,
            .data = {to.data.data, to.rows, to.cols},
            .data_t = {to.data_t.data, to.cols, to.rows},
            .scale = to.scale.data,
            .scale_t = to.scale_t.data},
           nullptr);
  check(cudaDeviceSynchronize());
}

Bits side_by_side(const Bits& left, const Bits& right, int64_t cols) {
  Bits both;
  for (size_t at = 0; at < left.size(); at += cols) {
    both.insert(both.end(), left.begin() + at, left.begin() + at + cols);
    both.insert(both.end(), right.begin() + at, right.begin() + at + cols);
  }
  return both;
}

struct Case {
  int64_t rows, features;
  bool gated = true;
  bool joint = false;
  bool power_of_two = false;
  MlpActivation activation = MlpActivation::kSilu;
};

void check_blocks(const Case& of, Bits gate, Bits up, Bits dh) {
  const int64_t features = of.features;
  const Values values =
      values_of(gate, of.gated ? up : Bits{}, dh, features, Dtype::kBFloat16, of.activation);
  const Buffer<uint16_t> g(gate);
  const Buffer<uint16_t> u(up);
  const Buffer<uint16_t> d(dh);
  const Blocks d_gate(of.rows, of.joint ? 2 * features : features);
  const Blocks d_up(of.rows, features);
  const Blocks h(of.rows, features);
  const int64_t padded = pad16(of.rows);
  MlpBackwardArgs args{.unit = {.gate = g.data,
                                .up = of.gated ? u.data : nullptr,
                                .rows = of.rows,
                                .features = features,
                                .ld = features,
                                .activation = of.activation},
                       .dh = d.data,
                       .dh_ld = features,
                       .dtype = Dtype::kE4M3,
                       .power_of_two = of.power_of_two,
                       .joint = of.joint,
                       .gate = {d_gate.data.data, padded, d_gate.cols},
                       .gate_t = {d_gate.data_t.data, features, padded},
                       .h_t = {h.data_t.data, features, padded},
                       .gate_scale = d_gate.scale.data,
                       .granularity = Granularity::kBlock1x128,
                       .gate_t_scale = d_gate.scale_t.data,
                       .h_scale = h.scale_t.data};
  if (of.joint) {  // up's half lies behind gate's
    args.up = {d_gate.data.data + features, padded, d_gate.cols};
    args.up_t = {d_gate.data_t.data + features * padded, features, padded};
    args.up_scale = d_gate.scale.data + blocks_of(features) * padded;
    args.up_t_scale = d_gate.scale_t.data + features;
  } else if (of.gated) {
    args.up = {d_up.data.data, padded, features};
    args.up_t = {d_up.data_t.data, features, padded};
    args.up_scale = d_up.scale.data;
    args.up_t_scale = d_up.scale_t.data;
  }
  REQUIRE(mlp_backward_workspace_bytes(args) == 0);
  mlp_backward(args, nullptr);
  check(cudaDeviceSynchronize());

  const auto check_part = [&](const Bits& expected, const Blocks& made, bool by_rows) {
    const Blocks quantized(of.rows, made.cols);
    quantize_blocks(expected, of.rows, of.power_of_two, quantized);
    made.check_same(quantized, by_rows);
  };
  if (of.joint) {
    check_part(side_by_side(values.d_gate, values.d_up, features), d_gate, true);
  } else {
    check_part(values.d_gate, d_gate, true);
    if (of.gated) check_part(values.d_up, d_up, true);
  }
  check_part(values.h, h, false);

  // One gradient alone, one way; then h alone, without dh.
  const Blocks alone(of.rows, features);
  MlpBackwardArgs few = args;
  few.joint = false;
  few.gate_t = few.up = few.up_t = few.h_t = {};
  few.gate = {alone.data.data, padded, features};
  few.gate_scale = alone.scale.data;
  mlp_backward(few, nullptr);
  few.gate = {};
  few.dh = nullptr;
  few.h_t = {alone.data_t.data, features, padded};
  few.h_scale = alone.scale_t.data;
  mlp_backward(few, nullptr);
  check(cudaDeviceSynchronize());
  const Blocks of_gate(of.rows, features);
  quantize_blocks(values.d_gate, of.rows, of.power_of_two, of_gate);
  REQUIRE(alone.data.host() == of_gate.data.host());
  REQUIRE(alone.data_t.host() == h.data_t.host());
}

}  // namespace

TEST_CASE("blocks of an MLP's backward: codes and scales of its values", "[mlp]") {
  for (const Case& of :
       {Case{1, 16}, Case{130, 208}, Case{300, 1040, true, false, true}, Case{257, 256, true, true},
        Case{16, 128, true, true, true}, Case{129, 272, false},
        Case{100, 144, false, false, true, MlpActivation::kGelu},
        Case{140, 384, true, true, false, MlpActivation::kGeluTanh},
        Case{50, 48, true, false, false, MlpActivation::kReluSquared},
        Case{50, 48, true, false, false, MlpActivation::kClampedSilu}}) {
    INFO("rows=" << of.rows << " features=" << of.features << " gated=" << of.gated
                 << " joint=" << of.joint << " activation=" << static_cast<int>(of.activation));
    const int64_t count = of.rows * of.features;
    const Bits gate = random_bf16(count, 1);
    const Bits up = random_bf16(count, 2);
    const Bits dh = random_bf16(count, 3, 1e-3F);
    check_blocks(of, gate, up, dh);
    check_blocks(of, gate, up, Bits(count, 0));
    for (const float odd : {INFINITY, -INFINITY, NAN, 3.3e38F, -95.0F, 0.0F}) {
      for (Bits parts[3] = {gate, up, dh}; Bits & part : parts) {
        const Bits before = part;
        part[count / 2] = part[count - 1] = to_bf16(odd);
        check_blocks(of, parts[0], parts[1], parts[2]);
        part = before;
      }
    }
  }
}
