// fp8/core_mlp.h: the activation of an MLP between its products, quantized on the way; as core.h
// has it. Not installed: its form follows what the torch layer needs.
#pragma once

#include "fp8/core.h"

namespace fp8::core {

// kClampedSilu is gpt-oss': gate = min(gate, limit), up = clamp(up, -limit, limit),
// h = gate * sigmoid(alpha * gate) * (up + 1).
enum class MlpActivation : uint8_t {
  kSilu,
  kGelu,
  kGeluTanh,
  kRelu,
  kReluSquared,
  kClampedSilu,
};

// h = act(gate) * up, or act(gate): each step rounded to dtype, as PyTorch's own operators round.
// Where there are scales, gate and up are e4m3 codes: of code * scale, rounded to dtype.
struct MlpUnitArgs {
  const void* gate = nullptr;         // [rows, features] in dtype, 16-byte aligned rows
  const void* up = nullptr;           // the same, or nullptr: plain
  const float* gate_scale = nullptr;  // [rows], of the codes; see mlp_backward_takes_codes
  const float* up_scale = nullptr;
  Dtype dtype = Dtype::kBFloat16;
  int64_t rows = 0;
  int64_t features = 0;  // multiple of 16
  int64_t ld = 0;        // elements from row to row, of both
  MlpActivation activation = MlpActivation::kSilu;
  float alpha = 1.702F;
  float limit = 7.0F;
  int device = -1;  // as in QuantizeArgs
};

// h in FP8: core::quantize of it, row-major, tensorwise (any scaling), rowwise or in blocks of 1 x
// 128.
struct MlpForwardArgs {
  MlpUnitArgs unit;
  Dtype dtype = Dtype::kE4M3;
  Granularity granularity = Granularity::kTensorwise;
  bool power_of_two = false;
  Destination data;           // [rows, features]
  float* scale = nullptr;     // laid out as Granularity says
  Scaling scaling;            // tensorwise
  float* amax_out = nullptr;  // tensorwise, one, optional
  void* workspace = nullptr;  // mlp_forward_workspace_bytes(args)
};
size_t mlp_forward_workspace_bytes(const MlpForwardArgs& args);
void mlp_forward(const MlpForwardArgs& args, Stream stream);

// From dh: the gradients of gate and up, and h again, in FP8 with a scale each; row-major and
// transposed. Tensorwise: one amax for gate and up where `joint`, of which there is one scale then.
// Two launches, one where no gradient is asked for.
struct MlpBackwardArgs {
  MlpUnitArgs unit;
  const void* dh = nullptr;  // [rows, features] in unit.dtype, optional without gradients
  int64_t dh_ld = 0;
  Dtype dtype = Dtype::kE5M2;    // of gradients
  Dtype h_dtype = Dtype::kE4M3;  // of h
  bool power_of_two = false;
  bool joint = false;
  bool gate_second = false;  // of a joint matrix
  Destination
      gate;        // [rows, features] each, none written where data is nullptr; `rows` and `ld` of
  Destination up;  // data_t as ranges of a larger matrix may have them
  Destination gate_t;  // [features, rows]
  Destination up_t;
  Destination h_t;
  float* gate_scale = nullptr;
  float* up_scale = nullptr;
  // kRowwise: a scale for each row of gate and up ([rows written]; joint: gate_scale is of both),
  // and, in gate_t_scale, up_t_scale and h_scale, for each column ([features]); e4m3. Three
  // launches.
  // kBlock1x128: the same for each 128 elements of a row or column, as Granularity lays them out;
  // joint: features in multiples of 128, and gate's and up's scales as ranges of the joint matrix's
  // have them. e4m3, without delay; one launch and no workspace.
  Granularity granularity = Granularity::kTensorwise;
  float* gate_t_scale = nullptr;
  float* up_t_scale = nullptr;
  // Scales from histories (Delayed), one pass; up's is gate's where joint. Of a gradient that is
  // not made there is none.
  bool delayed = false;
  uint32_t* gate_history = nullptr;  // [kAmaxHistorySize]
  uint32_t* up_history = nullptr;
  const float* h_amax = nullptr;  // with h_t: what made h's scale in the forward
  float* h_scale = nullptr;
  void* workspace = nullptr;  // mlp_backward_workspace_bytes(args)
};
size_t mlp_backward_workspace_bytes(const MlpBackwardArgs& args);
// Whether gate and up may be codes: of the unit that most models have. Others are dequantized
// first.
bool mlp_backward_takes_codes(const MlpUnitArgs& unit);
// Whether its device has the shared memory that scales of blocks take.
bool mlp_backward_makes_blocks(const MlpUnitArgs& unit);
void mlp_backward(const MlpBackwardArgs& args, Stream stream);

// The same without quantization: gradients of gate and up from dh, where it is given, and h. Each
// is optional.
struct MlpValuesArgs {
  MlpUnitArgs unit;
  const void* dh = nullptr;  // [rows, features] in unit.dtype
  int64_t dh_ld = 0;
  void* d_gate = nullptr;  // [rows, features] in unit.dtype, as all that follow
  void* d_up = nullptr;
  int64_t d_ld = 0;  // of both
  void* h = nullptr;
  int64_t h_ld = 0;
};
void mlp_values(const MlpValuesArgs& args, Stream stream);

}  // namespace fp8::core
