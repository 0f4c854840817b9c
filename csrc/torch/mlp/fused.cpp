#include "torch/mlp/fused.h"

#include <ATen/ATen.h>

#include "fp8/core_mlp.h"
#include "host/launch.h"
#include "torch/common/cuda_context.h"
#include "torch/common/tensors.h"

namespace fp8::mlp_node {
namespace {

using core::Granularity;

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

// Codes and scales of an operand, nothing written.
Operand allocate(const at::Tensor& like, int64_t rows, int64_t cols,
                 const QuantizeRequest& request) {
  const bool tensorwise = request.granularity == Granularity::kTensorwise;
  const at::Tensor one = tensorwise ? empty_on(like, {}, at::kFloat) : at::Tensor();
  const auto side = [&](int64_t lines, int64_t k) {
    const auto scales = scale_sizes(request.granularity, pad16(lines), pad16(k));
    return Side{.codes = empty_on(like, {pad16(lines), pad16(k)}, request.dtype),
                .scales = tensorwise ? one : empty_on(like, scales, at::kFloat),
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

// Their scales, of blocks or rows.
float* scales_of_columns(const Side& side, int64_t col) {
  if (!side.defined()) return nullptr;
  const int64_t before = side.granularity == Granularity::kBlock1x128
                             ? col / core::kScaleBlock * side.scales.size(1)
                             : 0;
  return pointer(side.scales) + before;
}
float* scales_of_rows(const Side& side, int64_t col) {
  return side.defined() ? pointer(side.scales) + col : nullptr;
}

uint32_t* history_of(const QuantizeRequest& request) {
  return std::get<core::Delayed>(core_scaling(request.scaling)).history;
}

// Whether fused_backward makes this: one scale of its own amax or of a history, or one for each
// row or 128 elements of it.
bool is_fused(const QuantizeRequest& request) {
  using Source = Scaling::Source;
  const Source source = request.scaling.source;
  if (request.column_sum) return false;
  if (request.granularity == Granularity::kTensorwise) {
    return source == Source::kOwnAmax || source == Source::kHistory;
  }
  return request.granularity != Granularity::kBlock128x128 && request.dtype == at::kFloat8_e4m3fn;
}

// Whether it makes scales as this request for h has them, of gradients too.
bool is_fused(const QuantizeRequest& of_h, const Unit& unit, const Products& p) {
  if (of_h.dtype != at::kFloat8_e4m3fn || of_h.granularity == Granularity::kBlock128x128) {
    return false;
  }
  if (of_h.granularity != Granularity::kBlock1x128) return true;
  const bool whole = unit.form != Form::kMerged || p.gate.size(1) % core::kScaleBlock == 0;
  return whole && core::mlp_backward_makes_blocks(unit_args(unit, p));
}

}  // namespace

bool suits_kernels(const Products& p, const at::Tensor& dh) {
  const auto aligned = [](const at::Tensor& t) {
    return !t.defined() || (is_matrix(t) && leading_dim(t) % 8 == 0 && on_16_bytes(t));
  };
  return p.gate.is_cuda() && p.gate.numel() > 0 && p.gate.size(1) % core::kPad == 0 &&
         aligned(p.gate) && aligned(p.up) && aligned(dh) &&
         (!p.up.defined() || leading_dim(p.up) == leading_dim(p.gate));
}

bool is_fused(const Unit& unit, const Products& p, const Wanted& wanted,
              const GradientRequests& requests) {
  const bool merged = unit.form == Form::kMerged;
  const bool two = wanted.gate && wanted.up && !merged;
  return !wanted.values && (!wanted.gate || is_fused(requests.gate)) &&
         (!wanted.up || merged || is_fused(requests.up)) &&
         (!two || requests.gate.scaling.source == requests.up.scaling.source) &&
         is_fused(requests.h, unit, p);
}

bool reads_codes(const Unit& unit, const Products& p) {
  return core::mlp_backward_takes_codes(unit_args(unit, p));
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
  if (args.granularity != Granularity::kTensorwise) {
    args.gate_scale = scales_of_columns(out.q_gate.along_cols, gate_at);
    args.gate_t_scale = scales_of_rows(out.q_gate.along_rows, gate_at);
    if (p.up.defined()) {
      const bool is_gates = merged && args.granularity == Granularity::kRowwise;
      if (!is_gates) args.up_scale = scales_of_columns(q_up.along_cols, up_at);
      args.up_t_scale = scales_of_rows(q_up.along_rows, up_at);
    }
    args.h_scale = scales_of_rows(out.q_h.along_rows, 0);
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

}  // namespace fp8::mlp_node
