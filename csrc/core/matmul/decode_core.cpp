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
void launch_decode(const DecodeParams&, bool, bool, bool, cudaStream_t) {}
#endif

// Shared memory that a block of compute capability 9.0 may have.
constexpr int kSharedBytes = 227 * 1024;

DecodeChoice choice_of(const DecodeArgs& args, const DeviceInfo& device) {
  if (!kHasDecode || device.capability != 90) return {};
  return choose_decode({.m = args.m,
                        .n = args.n,
                        .k = args.k,
                        .blocks = args.granularity == Granularity::kBlock1x128},
                       device.sm_count, kSharedBytes);
}

}  // namespace

DecodeInput decode_input(const DecodeArgs& args) {
  return choice_of(args, current_device(args.device)).input;
}

void decode(const DecodeArgs& args, Stream stream) {
  const DeviceInfo device = current_device(args.device);
  const auto [input, plan] = choice_of(args, device);
  require(input != DecodeInput::kNone, "decode: these extents are refused by decode_input");
  const bool values = input == DecodeInput::kValues;
  const bool blocks = args.granularity == Granularity::kBlock1x128;
  const bool one_scale = args.granularity == Granularity::kTensorwise;
  require(on_16_bytes(args.weight) && args.ldw % 16 == 0, "decode: weight or ldw off 16 bytes");
  require(values ? args.x != nullptr : args.x_codes != nullptr, "decode: x in the wrong form");
  require(!values || one_scale == (args.input_scale != nullptr),
          "decode: a static scale goes with kTensorwise");
  const int64_t padded_k = pad16(args.k);
  DecodeParams params{
      .weight_map = byte_matrix_map(args.weight, args.n, padded_k, args.ldw, plan.tile_rows),
      .x_map = {},
      .plan = plan,
      .m = static_cast<int>(args.m),
      .n = args.n,
      .k = args.k,
      .x = args.x,
      .ldx = args.ldx,
      .vectorized =
          on_16_bytes(args.x) && args.ldx * (args.x_dtype == Dtype::kFloat32 ? 4 : 2) % 16 == 0,
      .power_of_two = args.power_of_two,
      .input_scale = args.input_scale,
      .x_scale = args.x_scale,
      .x_scale_rows = args.scale_rows,
      .x_scale_step = one_scale ? 0 : 1,
      .weight_scale = args.weight_scale,
      .weight_scale_row_stride = args.weight_scale_row_stride,
      .weight_scale_col_stride = args.weight_scale_col_stride,
      .bias = args.bias,
      .y = args.y,
      .dtype = args.x_dtype};
  if (!values) {
    require(on_16_bytes(args.x_codes) && args.ld_codes % 16 == 0,
            "decode: x_codes or ld_codes off 16 bytes");
    params.x_map = byte_matrix_map(args.x_codes, args.m, padded_k, args.ld_codes, plan.tokens);
  }
  if (printing_plans()) print_first_time(decode_line(args, device.index, plan));
  launch_decode(params, values, blocks, args.pdl, stream);
}

}  // namespace fp8::core
