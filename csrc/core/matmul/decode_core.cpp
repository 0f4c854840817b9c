// fp8/core_decode.h: from a call's arguments to the kernel's parameters.
#include "core/device/device.h"
#include "core/device/tensor_map.h"
#include "core/matmul/decode_params.h"
#include "host/plan_text.h"

namespace fp8::core {
namespace {

#ifdef FP8_HOPPER_KERNELS  // code for sm_90a is in this build
constexpr bool kHasDecode = true;
#else
constexpr bool kHasDecode = false;
#endif

// Shared memory that a block of compute capability 9.0 may have.
constexpr int kSharedBytes = 227 * 1024;

bool is_blockwise(const DecodeArgs& args) { return args.granularity == Granularity::kBlock1x128; }

DecodePlan plan_of(const DecodeArgs& args) {
  const DeviceInfo device = current_device(args.device);
  if (!kHasDecode || device.capability != 90) return {};
  return choose_decode({.m = args.m,
                        .n = args.n,
                        .k = args.k,
                        .blocks = is_blockwise(args),
                        .one_scale = args.granularity == Granularity::kTensorwise &&
                                     args.weight_scale_row_stride == 0},
                       device.sm_count, kSharedBytes);
}

// In the workspace: codes [m, pad16(k)], then scales.
size_t codes_bytes(const DecodeArgs& args) { return static_cast<size_t>(args.m * pad16(args.k)); }

}  // namespace

#ifndef FP8_HOPPER_KERNELS
void launch_decode(const DecodeParams&, bool, bool, cudaStream_t) {}
#endif

bool suits_decode(const DecodeArgs& args) { return plan_of(args).stages > 0; }

size_t decode_workspace_bytes(const DecodeArgs& args) {
  const DecodePlan plan = plan_of(args);
  if (plan.stages == 0 || plan.source == DecodeSource::kQuantized) return 0;
  const int64_t groups = is_blockwise(args) ? plan.k_boxes : 1;
  return codes_bytes(args) + static_cast<size_t>(groups * plan.tokens) * sizeof(float);
}

void decode(const DecodeArgs& args, Stream stream) {
  const DecodePlan plan = plan_of(args);
  require(plan.stages > 0, "decode: extents or a device that suits_decode refuses");
  const bool one_scale = args.granularity == Granularity::kTensorwise;
  require(one_scale == (args.input_scale != nullptr), "decode: input_scale goes with kTensorwise");
  require(on_16_bytes(args.weight) && args.ldw % 16 == 0, "decode: weight or ldw off 16 bytes");
  const int64_t padded_k = pad16(args.k);
  const int64_t element = args.x_dtype == Dtype::kFloat32 ? 4 : 2;
  DecodeParams params{
      .weight_map = byte_matrix_map(args.weight, args.n, padded_k, args.ldw, plan.tile_rows),
      .x_map = {},
      .plan = plan,
      .m = static_cast<int>(args.m),
      .n = args.n,
      .k = args.k,
      .x = args.x,
      .ldx = args.ldx,
      .vectorized = on_16_bytes(args.x) && args.ldx * element % 16 == 0,
      .power_of_two = args.power_of_two,
      .input_scale = args.input_scale,
      .weight_scale = args.weight_scale,
      .weight_scale_row_stride = args.weight_scale_row_stride,
      .weight_scale_col_stride = args.weight_scale_col_stride,
      .bias = args.bias,
      .y = args.y,
      .dtype = args.x_dtype};
  if (plan.source != DecodeSource::kQuantized) {
    require(args.workspace != nullptr && on_16_bytes(args.workspace),
            "decode: no workspace, or one off 16 bytes");
    params.x_codes = static_cast<uint8_t*>(args.workspace);
    params.ld_codes = padded_k;
    params.x_scale = reinterpret_cast<float*>(params.x_codes + codes_bytes(args));
    params.x_map = byte_matrix_map(params.x_codes, args.m, padded_k, padded_k, plan.tokens);
  }
  if (printing_plans()) {
    print_first_time(decode_line(args, current_device(args.device).index, plan));
  }
  launch_decode(params, is_blockwise(args), args.pdl, stream);
}

}  // namespace fp8::core
