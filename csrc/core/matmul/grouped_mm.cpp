// The grouped matmul's host side: what it takes, which kernel, and the tensor maps. They span all
// groups, whose extents stay on the device.
#include "core/device/device.h"
#include "core/device/tensor_map.h"
#include "core/matmul/grouped_params.h"
#include "fp8/core_grouped.h"
#include "host/formats.h"
#include "host/grouped_plan.h"

namespace fp8::core {
namespace {

struct ScalePair {
  grouped::Scales a;
  grouped::Scales b;
};

ScalePair scales_of(const GroupedMmArgs& args) {
  switch (args.granularity) {
    case Granularity::kTensorwise:
      return {{args.a_scale, 0, 0}, {args.b_scale, 0, 0}};
    case Granularity::kRowwise:
      return {{args.a_scale, args.columns ? args.m : 0, 1}, {args.b_scale, args.n, 1}};
    default:
      return {{args.a_scale, 0, args.a_scale_ld},
              {args.b_scale, blocks_of(args.n) * args.b_scale_ld, args.b_scale_ld}};
  }
}

}  // namespace

bool suits_grouped_mm(const GroupedMmArgs& args) {
#ifdef FP8_HOPPER_KERNELS
  return current_device().capability == 90 && suits_grouped_extents(args) && on_16_bytes(args.a) &&
         on_16_bytes(args.b) && on_16_bytes(args.out);
#else
  static_cast<void>(args);
  return false;
#endif
}

void grouped_mm(const GroupedMmArgs& args, Stream stream) {
  require(suits_grouped_mm(args), "grouped_mm takes what suits_grouped_mm says, on Hopper");
  require(args.offsets != nullptr || args.groups == 1, "grouped_mm: no offsets of several groups");
  require(!args.accumulate || args.out_dtype == Dtype::kFloat32, "grouped_mm adds to float32 only");
  const DeviceInfo device = current_device();
  const GroupedPlan plan = plan_grouped(args, device.sm_count);
  if (printing_plans()) print_first_time(grouped_plan_line(args, device.index, describe(plan)));
#ifdef FP8_HOPPER_KERNELS
  const auto [a_scale, b_scale] = scales_of(args);
  const grouped::Params params{
      .a = byte_matrix_map(args.a, args.m, args.k, args.k, grouped::kBoxRowsA),
      .b = byte_matrix_map(args.b, args.columns ? args.n : args.groups * args.n, args.k, args.k,
                           grouped::kBoxRowsB),
      .grid = {.offsets = args.offsets,
               .groups = static_cast<int>(args.groups),
               .limit = static_cast<int>(args.columns ? args.k : args.m),
               .rows = static_cast<int>(args.m),
               .cols = static_cast<int>(args.n),
               .k = static_cast<int>(args.k)},
      .a_scale = a_scale,
      .b_scale = b_scale,
      .out = args.out,
      .ld_out = args.n,
      .group_out = args.columns ? args.m * args.n : 0,
      .out_bytes = static_cast<int>(dtype_bytes(args.out_dtype)),
      .out_half = args.out_dtype == Dtype::kFloat16,
      .add = args.accumulate};
  if (args.columns) {
    grouped::launch_columns(plan, params, stream);
  } else if (plan.accumulation == Accumulation::kBlocks) {
    grouped::launch_blocks(plan, params, stream);
  } else {
    grouped::launch_rows(plan, params, stream);
  }
#else
  static_cast<void>(stream);
#endif
}

}  // namespace fp8::core
