#include "torch/mlp/unit.h"

#include <ATen/ATen.h>

#include "torch/common/tensors.h"
#include "torch/mlp/fused.h"

namespace fp8::mlp_node {

// --- composed of ATen's operators: the CPU, and what no kernel does ---

at::Tensor act(Activation activation, const at::Tensor& x) {
  switch (activation) {
    case Activation::kSilu:
      return at::silu(x);
    case Activation::kGelu:
      return at::gelu(x);
    case Activation::kGeluTanh:
      return at::gelu(x, "tanh");
    case Activation::kRelu:
      return at::relu(x);
    default:
      return at::square(at::relu(x));
  }
}

namespace {

using core::Granularity;

at::Tensor act_backward(Activation activation, const at::Tensor& dy, const at::Tensor& x) {
  switch (activation) {
    case Activation::kSilu:
      return at::silu_backward(dy, x);
    case Activation::kGelu:
      return at::gelu_backward(dy, x);
    case Activation::kGeluTanh:
      return at::gelu_backward(dy, x, "tanh");
    case Activation::kRelu:
      return at::threshold_backward(dy, x, 0);
    default:
      return at::threshold_backward(dy * (at::relu(x) * 2), x, 0);
  }
}

struct Clamped {  // gpt-oss' unit, step by step
  at::Tensor gate;
  at::Tensor up_1;  // up + 1
  at::Tensor sigmoid;
  at::Tensor glu;

  Clamped(const Unit& unit, const Products& p)
      : gate(p.gate.clamp_max(unit.limit)),
        up_1(p.up.clamp(-unit.limit, unit.limit) + 1),
        sigmoid(at::sigmoid(gate * unit.alpha)),
        glu(gate * sigmoid) {}
};

struct Composed {
  at::Tensor gate;
  at::Tensor up;
  at::Tensor h;
};

Composed compose_backward(const Unit& unit, const Products& p, const at::Tensor& dh,
                          const Wanted& wanted) {
  Composed out;
  if (unit.activation == Activation::kClampedSilu) {
    const Clamped c(unit, p);
    if (wanted.h) out.h = c.up_1 * c.glu;
    if (wanted.gate) {
      const at::Tensor d_glu = dh * c.up_1;
      const at::Tensor d_sigmoid = at::sigmoid_backward(d_glu * c.gate, c.sigmoid);
      const at::Tensor d = d_glu * c.sigmoid + d_sigmoid * unit.alpha;
      out.gate = d.masked_fill(p.gate.le(unit.limit).logical_not_(), 0);
    }
    if (wanted.up) {
      const at::Tensor inside = p.up.ge(-unit.limit).logical_and_(p.up.le(unit.limit));
      out.up = (dh * c.glu).masked_fill(inside.logical_not_(), 0);
    }
    return out;
  }
  if (unit.form == Form::kPlain) {
    if (wanted.h) out.h = act(unit.activation, p.gate);
    if (wanted.gate) out.gate = act_backward(unit.activation, dh, p.gate);
    return out;
  }
  const at::Tensor a = wanted.h || wanted.up ? act(unit.activation, p.gate) : at::Tensor();
  if (wanted.h) out.h = a * p.up;
  if (wanted.up) out.up = dh * a;
  if (wanted.gate) out.gate = act_backward(unit.activation, dh * p.up, p.gate);
  return out;
}

at::Tensor joined(const Unit& unit, const at::Tensor& gate, const at::Tensor& up) {
  return unit.gate_second ? at::cat({up, gate}, 1) : at::cat({gate, up}, 1);
}

// The products themselves, where they are codes.
Products values_of(const Unit& unit, const Products& p) {
  if (!p.gate_scale.defined()) return p;
  const auto decoded = [&](const at::Tensor& codes, const at::Tensor& scale) {
    if (!codes.defined()) return at::Tensor();
    const at::Tensor of_rows = scale.narrow(0, 0, codes.size(0)).unsqueeze(1);
    return dequantize_matrix(codes, of_rows.expand_as(codes), p.dtype);
  };
  const bool merged = unit.form == Form::kMerged;
  return products_of(unit, decoded(merged ? p.joint : p.gate, p.gate_scale),
                     merged ? at::Tensor() : decoded(p.up, p.up_scale));
}

Operand quantized(const at::Tensor& x, const QuantizeRequest& request) {
  return request.along_cols || request.along_rows ? operand::make(x, request) : Operand{};
}

}  // namespace

Side store(const at::Tensor& product) {
  if (!product.defined()) return {};
  return operand::make(product, {.granularity = Granularity::kRowwise}).along_cols;
}

Products products_of(const Unit& unit, const Side& gate_out, const Side& up_out, int64_t features,
                     at::ScalarType dtype) {
  const auto codes = [&](const Side& side, int64_t cols) {
    return side.codes.narrow(0, 0, side.rows).narrow(1, 0, cols);
  };
  const bool merged = unit.form == Form::kMerged;
  const bool separate = unit.form == Form::kSeparate;
  Products out = products_of(unit, codes(gate_out, merged ? 2 * features : features),
                             separate ? codes(up_out, features) : at::Tensor());
  out.gate_scale = gate_out.scales;
  if (out.up.defined()) out.up_scale = separate ? up_out.scales : gate_out.scales;
  out.dtype = dtype;
  return out;
}

Products products_of(const Unit& unit, const at::Tensor& gate_out, const at::Tensor& up_out) {
  Products out{.gate = gate_out, .dtype = gate_out.scalar_type()};
  if (unit.form == Form::kSeparate) out.up = up_out;
  if (unit.form != Form::kMerged) return out;
  const int64_t features = gate_out.size(1) / 2;
  out.joint = gate_out;
  out.gate = gate_out.narrow(1, unit.gate_second ? features : 0, features);
  out.up = gate_out.narrow(1, unit.gate_second ? 0 : features, features);
  return out;
}

Operand quantize_h(const Unit& unit, const Products& p, const QuantizeRequest& request) {
  const bool fits = request.dtype == at::kFloat8_e4m3fn && !request.along_rows;
  if (fits && suits_kernels(p, {})) return fused_h(unit, p, request);
  return operand::make(compose_backward(unit, p, {}, {.h = true}).h, request);
}

UnitGradients backward_unit(const Unit& unit, const Products& given, const at::Tensor& dh,
                            const Wanted& wanted, const GradientRequests& requests) {
  const bool merged = unit.form == Form::kMerged;
  const bool has_kernels = suits_kernels(given, dh);
  const bool quantizes = has_kernels && is_fused(unit, given, wanted, requests);
  const Products p = quantizes && reads_codes(unit, given) ? given : values_of(unit, given);
  if (quantizes) return fused_backward(unit, p, dh, wanted, requests);
  UnitGradients out;
  if (has_kernels) {
    out = fused_values(unit, p, dh, wanted);
  } else {
    Composed composed = compose_backward(unit, p, dh, wanted);
    out.h = composed.h;
    out.gate = merged && wanted.gate ? joined(unit, composed.gate, composed.up) : composed.gate;
    if (!merged) out.up = composed.up;
  }
  if (out.gate.defined()) out.q_gate = quantized(out.gate, requests.gate);
  if (out.up.defined()) out.q_up = quantized(out.up, requests.up);
  if (out.h.defined()) out.q_h = quantized(out.h, requests.h);
  return out;
}

}  // namespace fp8::mlp_node
