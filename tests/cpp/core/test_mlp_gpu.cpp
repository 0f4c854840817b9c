// An MLP's passes on a GPU without torch. Eight features are computed by fast forms where these
// give the same bits: next to a gate of -100 they are not, which makes the reference.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "device_memory.h"
#include "fp8/core_mlp.h"
#include "mlp_problem.h"

using namespace fp8::core;

namespace {

// The forward's h, alone: its formula is not that of a backward.
Bits h_of(const Bits& gate, int64_t features, Dtype dtype) {
  const auto count = static_cast<int64_t>(gate.size());
  const Buffer<uint16_t> g(gate);
  const Buffer<uint16_t> h(count);
  mlp_values({.unit = {.gate = g.data,
                       .dtype = dtype,
                       .rows = count / features,
                       .features = features,
                       .ld = features},
              .h = h.data,
              .h_ld = features},
             nullptr);
  check(cudaDeviceSynchronize());
  return h.host();
}

// Every eighth value of a vector that holds -100 otherwise.
Bits among_low(const Bits& values, uint16_t low) {
  Bits all(values.size() * 8, low);
  for (size_t i = 0; i < values.size(); ++i) all[8 * i] = values[i];
  return all;
}
Bits every_eighth(const Bits& all) {
  Bits values(all.size() / 8);
  for (size_t i = 0; i < values.size(); ++i) values[i] = all[8 * i];
  return values;
}

float amax_of(const Bits& bits) {  // NaN above all
  uint16_t most = 0;
  for (const uint16_t b : bits) most = std::max<uint16_t>(most, b & 0x7FFFU);
  return from_bf16(most);
}
bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

struct Amaxes {
  float h, gate, up;
};

// What the tensorwise passes take for amaxes: h's, and from the scales those of the gradients.
Amaxes amaxes_of(const Bits& gate, const Bits& up, const Bits& dh, int64_t features) {
  const auto count = static_cast<int64_t>(gate.size());
  const int64_t rows = count / features;
  const Buffer<uint16_t> g(gate);
  const Buffer<uint16_t> u(up.empty() ? gate : up);
  const Buffer<uint16_t> d(dh);
  const MlpUnitArgs unit{.gate = g.data,
                         .up = up.empty() ? nullptr : u.data,
                         .rows = rows,
                         .features = features,
                         .ld = features};
  const int64_t padded = pad16(rows);
  const Buffer<uint8_t> codes(padded * features);
  const Buffer<float> scale(1);
  const Buffer<float> amax(1);
  MlpForwardArgs forward{.unit = unit,
                         .data = {codes.data, padded, features},
                         .scale = scale.data,
                         .amax_out = amax.data};
  const Buffer<uint8_t> forward_space(mlp_forward_workspace_bytes(forward));
  forward.workspace = forward_space.data;
  mlp_forward(forward, nullptr);
  const Buffer<float> scales(2);
  const Buffer<uint8_t> more_codes(padded * features);
  MlpBackwardArgs backward{.unit = unit,
                           .dh = d.data,
                           .dh_ld = features,
                           .gate = {codes.data, padded, features},
                           .gate_scale = scales.data};
  if (!up.empty()) {
    backward.up = {more_codes.data, padded, features};
    backward.up_scale = scales.data + 1;
  }
  const Buffer<uint8_t> backward_space(mlp_backward_workspace_bytes(backward));
  backward.workspace = backward_space.data;
  mlp_backward(backward, nullptr);
  check(cudaDeviceSynchronize());
  const std::vector<float> of = scales.host();
  return {amax.host()[0], of[0], up.empty() ? 0 : of[1]};
}

// scale = amax / 57344, rounded; the other way round it is the same amax, or next to it.
void check_scale(float scale, float amax) {
  if (std::isfinite(amax) && amax > 1e-30F) {
    REQUIRE(std::abs(scale * 57344.0F / amax - 1) < 1e-6F);
  } else if (!std::isfinite(amax)) {
    REQUIRE(!(scale < INFINITY));
  }
}

void check_screen(const Bits& gate, const Bits& up, const Bits& dh, int64_t features) {
  const Values exact = values_of(gate, up, dh, features);
  const Amaxes screened = amaxes_of(gate, up, dh, features);
  REQUIRE(same(screened.h, amax_of(exact.h)));
  check_scale(screened.gate, amax_of(exact.d_gate));
  if (!up.empty()) check_scale(screened.up, amax_of(exact.d_up));
}

}  // namespace

TEST_CASE("silu has the same bits in its fast form, for every x in 16 bits", "[mlp]") {
  Bits every(1 << 16);
  for (size_t i = 0; i < every.size(); ++i) every[i] = static_cast<uint16_t>(i);
  const struct {
    Dtype dtype;
    uint16_t low;  // -100
  } kinds[] = {{Dtype::kBFloat16, 0xC2C8}, {Dtype::kFloat16, 0xD640}};
  for (const auto& kind : kinds) {
    INFO("dtype " << static_cast<int>(kind.dtype));
    const Bits fast = h_of(every, 16, kind.dtype);
    const Bits slow = every_eighth(h_of(among_low(every, kind.low), 16, kind.dtype));
    REQUIRE(fast == slow);
    // The backward's h and both gradients, with some up and dh for each gate.
    for (unsigned seed = 0; seed < 4; ++seed) {
      Bits up = random_bf16(1 << 16, 10 + seed);
      Bits dh = random_bf16(1 << 16, 20 + seed);
      if (kind.dtype == Dtype::kFloat16) {  // any bits without Inf and NaN
        for (uint16_t& b : up) b &= 0xBFFFU;
        for (uint16_t& b : dh) b &= 0xBFFFU;
      }
      const Values a = values_of(every, up, dh, 16, kind.dtype);
      const Values b = values_of(among_low(every, kind.low), among_low(up, up[0]),
                                 among_low(dh, dh[0]), 16, kind.dtype);
      REQUIRE(a.h == every_eighth(b.h));
      REQUIRE(a.d_gate == every_eighth(b.d_gate));
      REQUIRE(a.d_up == every_eighth(b.d_up));
    }
  }
}

TEST_CASE("amaxes that are screened are exact", "[mlp]") {
  const int64_t rows = 77;
  const int64_t features = 1040;
  const int64_t count = rows * features;
  const Bits up = random_bf16(count, 2);
  const Bits dh = random_bf16(count, 3, 1e-3F);
  const Bits normal = random_bf16(count, 1);
  for (const bool gated : {true, false}) {
    const Bits factor = gated ? up : Bits{};
    const auto check_gates = [&](const Bits& gate) { check_screen(gate, factor, dh, features); };
    check_gates(normal);
    check_gates(random_bf16(count, 4, 30));
    check_gates(random_bf16(count, 5, 1e-38F));
    check_gates(Bits(count, to_bf16(-1.28125F)));  // where silu has hardly a slope
    check_gates(Bits(count, to_bf16(-88.0F)));     // where 1 / (1 + exp(-x)) is no normal number
    check_gates(Bits(count, to_bf16(-86.5F)));
    check_gates(Bits(count, to_bf16(-95.0F)));
    check_gates(Bits(count, 1));  // the smallest there is
    check_gates(Bits(count, 0));
    for (const float odd : {INFINITY, -INFINITY, NAN, 3.3e38F, -3.3e38F, 200.0F}) {
      for (const int64_t at : {int64_t{0}, count / 2 + 3, count - 1}) {
        Bits gate = normal;
        gate[at] = to_bf16(odd);
        check_gates(gate);
        if (gated) {
          Bits other = up;
          other[at] = to_bf16(odd);
          check_screen(normal, other, dh, features);
        }
        Bits gradient = dh;
        gradient[at] = to_bf16(odd);
        check_screen(normal, factor, gradient, features);
      }
    }
    // What is largest may stand anywhere, and be a little larger only.
    for (const int64_t at : {int64_t{8}, int64_t{1023}, int64_t{1024}, features, count - 1}) {
      Bits gate(count, to_bf16(2.0F));
      gate[at] = to_bf16(2.015625F);
      check_gates(gate);
    }
  }
}

TEST_CASE("tiles of an MLP's backward: the codes of its values, both ways", "[mlp]") {
  // More tiles than blocks that run at a time, and edges that are not whole.
  for (const auto& [rows, features] :
       {std::pair<int64_t, int64_t>{3, 16}, {130, 208}, {4000, 1040}}) {
    INFO("rows=" << rows << " features=" << features);
    const int64_t count = rows * features;
    const Bits gate = random_bf16(count, 1);
    const Bits up = random_bf16(count, 2);
    const Bits dh = random_bf16(count, 3);
    const Buffer<uint16_t> g(gate);
    const Buffer<uint16_t> u(up);
    const Buffer<uint16_t> d(dh);
    const int64_t padded = pad16(rows);
    const Buffer<uint8_t> gate_codes(padded * features);
    const Buffer<uint8_t> up_codes(padded * features);
    const Buffer<uint8_t> gate_t(features * padded);
    const Buffer<uint8_t> up_t(features * padded);
    const Buffer<uint8_t> h_t(features * padded);
    const Buffer<float> scales(3);
    const Buffer<float> h_amax(std::vector<float>{8.0F});
    MlpBackwardArgs args{
        .unit = {.gate = g.data, .up = u.data, .rows = rows, .features = features, .ld = features},
        .dh = d.data,
        .dh_ld = features,
        .gate = {gate_codes.data, padded, features},
        .up = {up_codes.data, padded, features},
        .gate_t = {gate_t.data, features, padded},
        .up_t = {up_t.data, features, padded},
        .h_t = {h_t.data, features, padded},
        .gate_scale = scales.data,
        .up_scale = scales.data + 1,
        .h_amax = h_amax.data,
        .h_scale = scales.data + 2};
    const Buffer<uint8_t> space(mlp_backward_workspace_bytes(args));
    args.workspace = space.data;
    mlp_backward(args, nullptr);
    check(cudaDeviceSynchronize());

    const Values values = values_of(gate, up, dh, features);
    const std::vector<float> made = scales.host();
    const auto check_part = [&](const Bits& of, Dtype dtype, const std::vector<uint8_t>& by_rows,
                                const std::vector<uint8_t>& by_cols, float amax, float scale_made) {
      // The quantize op's own codes of the same values with the same amax.
      const Buffer<uint16_t> x(of);
      const Buffer<uint8_t> codes(padded * features);
      const Buffer<uint8_t> codes_t(features * padded);
      QuantizeArgs quantized{.x = x.data,
                             .x_dtype = Dtype::kBFloat16,
                             .rows = rows,
                             .cols = features,
                             .ld = features,
                             .dtype = dtype};
      quantized.data = {codes.data, padded, features};
      quantized.data_t = {codes_t.data, features, padded};
      const Buffer<float> known(std::vector<float>{amax});
      const Buffer<float> scale(1);
      quantized.scaling = KnownAmax{known.data};
      quantized.scale = scale.data;
      const Buffer<uint8_t> workspace(quantize_workspace_bytes(quantized) + 16);
      quantized.workspace = workspace.data;
      quantize(quantized, nullptr);
      check(cudaDeviceSynchronize());
      if (!by_rows.empty()) REQUIRE(by_rows == codes.host());
      REQUIRE(by_cols == codes_t.host());
      REQUIRE(scale.host()[0] == scale_made);
    };
    check_part(values.d_gate, Dtype::kE5M2, gate_codes.host(), gate_t.host(),
               amax_of(values.d_gate), made[0]);
    check_part(values.d_up, Dtype::kE5M2, up_codes.host(), up_t.host(), amax_of(values.d_up),
               made[1]);
    check_part(values.h, Dtype::kE4M3, {}, h_t.host(), 8.0F, made[2]);
  }
}
