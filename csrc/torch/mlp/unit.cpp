#include "torch/mlp/unit.h"

#include <ATen/ATen.h>

#include "fp8/core_mlp.h"
#include "host/formats.h"
#include "torch/common/cuda_context.h"
#include "torch/common/tensors.h"

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

// --- fused ---

// Whether kernels can read gate and up: aligned rows of whole sixteens.
bool suits_kernels(const Products& p) {
  const auto aligned = [&](const at::Tensor& t) {
    return !t.defined() || (t.stride(1) == 1 && leading_dim(t) % 8 == 0 && on_16_bytes(t));
  };
  return p.gate.is_cuda() && p.gate.numel() > 0 && p.gate.size(1) % core::kPad == 0 &&
         aligned(p.gate) && aligned(p.up) &&
         (!p.up.defined() || leading_dim(p.up) == leading_dim(p.gate));
}

core::MlpUnitArgs unit_args(const Unit& unit, const Products& p) {
  const auto scales = [](const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<float>() : nullptr;
  };
  return {.gate = p.gate.const_data_ptr(),
          .up = p.up.defined() ? p.up.const_data_ptr() : nullptr,
          .gate_scale = scales(p.gate_scale),
          .up_scale = scales(p.up_scale),
          .dtype = to_core(p.dtype),
          .rows = p.gate.size(0),
          .features = p.gate.size(1),
          .ld = leading_dim(p.gate),
          .activation = static_cast<core::MlpActivation>(unit.activation),
          .alpha = static_cast<float>(unit.alpha),
          .limit = static_cast<float>(unit.limit),
          .device = p.gate.device().index()};
}

at::Tensor workspace_of(size_t bytes, const at::Tensor& like) {
  return bytes == 0 ? at::Tensor() : empty_on(like, {static_cast<int64_t>(bytes)}, at::kByte);
}

// The gradients of the products in their dtype, and h; on their way to other passes.
UnitGradients fused_values(const Unit& unit, const Products& p, const at::Tensor& dh,
                           const Wanted& wanted) {
  const int64_t m = p.gate.size(0);
  const int64_t features = p.gate.size(1);
  const bool merged = unit.form == Form::kMerged;
  const auto make = [&](int64_t cols) { return empty_on(p.gate, {m, cols}, p.gate.scalar_type()); };
  UnitGradients out;
  if (wanted.gate) out.gate = make(merged ? 2 * features : features);
  if (wanted.up && !merged) out.up = make(features);
  if (wanted.h) out.h = make(features);
  core::MlpValuesArgs args{.unit = unit_args(unit, p), .d_ld = features, .h_ld = features};
  if (wanted.gate || wanted.up) {
    args.dh = dh.const_data_ptr();
    args.dh_ld = leading_dim(dh);
  }
  if (wanted.h) args.h = out.h.mutable_data_ptr();
  if (merged && wanted.gate) {
    const Products d = products_of(unit, out.gate, {});
    args.d_gate = d.gate.mutable_data_ptr();
    args.d_up = d.up.mutable_data_ptr();
    args.d_ld = 2 * features;
  } else {
    if (wanted.gate) args.d_gate = out.gate.mutable_data_ptr();
    if (wanted.up) args.d_up = out.up.mutable_data_ptr();
  }
  core::mlp_values(args, cuda::current_stream(p.gate));
  return out;
}

// Codes and scales of an operand, nothing written.
Operand allocate(const at::Tensor& like, int64_t rows, int64_t cols,
                 const QuantizeRequest& request) {
  const bool tensorwise = request.granularity == Granularity::kTensorwise;
  const at::Tensor one = tensorwise ? empty_on(like, {}, at::kFloat) : at::Tensor();
  const auto side = [&](int64_t lines, int64_t k) {
    return Side{.codes = empty_on(like, {pad16(lines), pad16(k)}, request.dtype),
                .scales = tensorwise ? one : empty_on(like, {pad16(lines)}, at::kFloat),
                .granularity = request.granularity,
                .rows = lines};
  };
  Operand out;
  if (request.along_cols) out.along_cols = side(rows, cols);
  if (request.along_rows) out.along_rows = side(cols, rows);
  out.launched = true;
  return out;
}

float* pointer(const at::Tensor& scales) {
  return scales.defined() ? scales.mutable_data_ptr<float>() : nullptr;
}

// The one of both sides.
float* scale_of(const Operand& q) {
  return pointer(q.along_cols.defined() ? q.along_cols.scales : q.along_rows.scales);
}

Operand fused_h(const Unit& unit, const Products& p, const QuantizeRequest& request) {
  const int64_t rows = pad16(p.gate.size(0));
  const int64_t features = p.gate.size(1);
  Operand out;
  out.along_cols = {
      .codes = empty_on(p.gate, {rows, features}, request.dtype),
      .scales = empty_on(p.gate, scale_sizes(request.granularity, rows, features), at::kFloat),
      .granularity = request.granularity,
      .rows = p.gate.size(0)};
  if (request.keep_amax) out.amax = empty_on(p.gate, {}, at::kFloat);
  out.launched = true;
  core::MlpForwardArgs args{.unit = unit_args(unit, p),
                            .dtype = to_core(request.dtype),
                            .granularity = request.granularity,
                            .power_of_two = request.power_of_two,
                            .data = {out.along_cols.codes.mutable_data_ptr(), rows, features},
                            .scale = out.along_cols.scales.mutable_data_ptr<float>(),
                            .scaling = core_scaling(request.scaling)};
  if (out.amax.defined()) args.amax_out = out.amax.mutable_data_ptr<float>();
  const at::Tensor workspace = workspace_of(core::mlp_forward_workspace_bytes(args), p.gate);
  if (workspace.defined()) args.workspace = workspace.mutable_data_ptr();
  core::mlp_forward(args, cuda::current_stream(p.gate));
  return out;
}

// Part of a side's codes: columns from `col` on of row-major ones, rows from `col` on of transposed
// ones; `features` of them.
core::Destination columns(const Side& side, int64_t col) {
  if (!side.defined()) return {};
  return {static_cast<uint8_t*>(side.codes.mutable_data_ptr()) + col, side.codes.size(0),
          side.codes.size(1)};
}
core::Destination rows(const Side& side, int64_t col, int64_t features) {
  if (!side.defined()) return {};
  return {static_cast<uint8_t*>(side.codes.mutable_data_ptr()) + col * side.codes.size(1), features,
          side.codes.size(1)};
}

// Whether fused_backward makes this: one scale of its own amax or of a history, or one for each
// row.
bool is_fused(const QuantizeRequest& request) {
  using Source = Scaling::Source;
  const Source source = request.scaling.source;
  if (request.column_sum) return false;
  if (request.granularity == Granularity::kRowwise) return request.dtype == at::kFloat8_e4m3fn;
  return request.granularity == Granularity::kTensorwise &&
         (source == Source::kOwnAmax || source == Source::kHistory);
}

uint32_t* history_of(const QuantizeRequest& request) {
  return std::get<core::Delayed>(core_scaling(request.scaling)).history;
}

UnitGradients fused_backward(const Unit& unit, const Products& p, const at::Tensor& dh,
                             const Wanted& wanted, const GradientRequests& requests) {
  const int64_t m = p.gate.size(0);
  const int64_t features = p.gate.size(1);
  const bool merged = unit.form == Form::kMerged;
  UnitGradients out;
  if (wanted.gate) {
    out.q_gate = allocate(p.gate, m, merged ? 2 * features : features, requests.gate);
  }
  if (wanted.up && !merged) out.q_up = allocate(p.gate, m, features, requests.up);
  if (wanted.h) out.q_h = allocate(p.gate, m, features, requests.h);
  const int64_t gate_at = merged && unit.gate_second ? features : 0;
  const int64_t up_at = merged && !unit.gate_second ? features : 0;
  const Operand& q_up = merged ? out.q_gate : out.q_up;
  core::MlpBackwardArgs args{.unit = unit_args(unit, p),
                             .dtype = to_core(requests.gate.dtype),
                             .h_dtype = to_core(requests.h.dtype),
                             .power_of_two = requests.gate.power_of_two,
                             .joint = merged,
                             .gate = columns(out.q_gate.along_cols, gate_at),
                             .gate_t = rows(out.q_gate.along_rows, gate_at, features),
                             .h_t = rows(out.q_h.along_rows, 0, features),
                             .gate_scale = scale_of(out.q_gate),
                             .h_scale = scale_of(out.q_h)};
  if (p.up.defined()) {
    args.up = columns(q_up.along_cols, up_at);
    args.up_t = rows(q_up.along_rows, up_at, features);
    if (!merged) args.up_scale = scale_of(out.q_up);
  }
  args.gate_second = merged && unit.gate_second;
  args.granularity = requests.h.granularity;
  if (args.granularity == Granularity::kRowwise) {
    args.gate_scale = pointer(out.q_gate.along_cols.scales);
    args.up_scale = pointer(out.q_up.along_cols.scales);
    const auto of_columns = [](const Operand& q, int64_t at) {
      float* scales = pointer(q.along_rows.scales);
      return scales == nullptr ? nullptr : scales + at;
    };
    args.gate_t_scale = of_columns(out.q_gate, gate_at);
    if (p.up.defined()) args.up_t_scale = of_columns(q_up, up_at);
    args.h_scale = of_columns(out.q_h, 0);
  }
  args.delayed =
      (wanted.gate ? requests.gate : requests.up).scaling.source == Scaling::Source::kHistory &&
      dh.defined();
  if (args.delayed && wanted.gate) args.gate_history = history_of(requests.gate);
  if (args.delayed && wanted.up && !merged) args.up_history = history_of(requests.up);
  if (wanted.h && args.granularity == Granularity::kTensorwise) {
    args.h_amax = requests.h.scaling.tensor.const_data_ptr<float>();
  }
  if (dh.defined()) {
    args.dh = dh.const_data_ptr();
    args.dh_ld = leading_dim(dh);
  }
  const at::Tensor workspace = workspace_of(core::mlp_backward_workspace_bytes(args), p.gate);
  if (workspace.defined()) args.workspace = workspace.mutable_data_ptr();
  core::mlp_backward(args, cuda::current_stream(p.gate));
  return out;
}

bool is_aligned(const at::Tensor& dh) {
  return !dh.defined() || (is_matrix(dh) && leading_dim(dh) % 8 == 0 && on_16_bytes(dh));
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
  if (fits && suits_kernels(p)) return fused_h(unit, p, request);
  return operand::make(compose_backward(unit, p, {}, {.h = true}).h, request);
}

UnitGradients backward_unit(const Unit& unit, const Products& given, const at::Tensor& dh,
                            const Wanted& wanted, const GradientRequests& requests) {
  const bool merged = unit.form == Form::kMerged;
  const bool two = wanted.gate && wanted.up && !merged;
  const bool has_kernels = suits_kernels(given) && is_aligned(dh);
  const bool quantizes =
      has_kernels && !wanted.values && (!wanted.gate || is_fused(requests.gate)) &&
      (!wanted.up || merged || is_fused(requests.up)) &&
      (!two || requests.gate.scaling.source == requests.up.scaling.source) &&
      !is_blockwise(requests.h.granularity) && requests.h.dtype == at::kFloat8_e4m3fn;
  const bool reads_codes = quantizes && core::mlp_backward_takes_codes(unit_args(unit, given));
  const Products p = reads_codes ? given : values_of(unit, given);
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
