// An MLP's unit without quantization: h, or the gradients of gate and up and h, in the products'
// dtype, for recipes that quantize them in passes of their own. Bound by bandwidth: 4 + 2 bytes an
// element forward, 6 + 6 backward (bf16).
#include "core/device/device.h"
#include "core/device/dispatch.cuh"
#include "core/mlp/plan.h"
#include "core/mlp/unit.cuh"

namespace fp8::core {
namespace {

struct ValuesParams {
  MlpValuesArgs args;
  UnitAmaxPlan plan;
};

template <typename T, bool kBackward>
constexpr int kValuesBlocks = sizeof(T) == 4 ? 1
                              : kBackward    ? 2
                                             : 3;

template <typename T, bool kGated, bool kBackward>
__global__ void __launch_bounds__(kThreads, kValuesBlocks<T, kBackward>)
    unit_values_kernel(const ValuesParams p) {
  let_next_start();
  const MlpValuesArgs& a = p.args;
  const int64_t col = blockIdx.x * kUnitAmaxCols + threadIdx.x % 32 * 8;
  const int64_t begin = blockIdx.y * p.plan.rows_per_chunk;
  const int64_t end = min(begin + p.plan.rows_per_chunk, a.unit.rows);
  wait_for_previous();
  if (col >= a.unit.features) return;
  for (int64_t row = begin + threadIdx.x / 32; row < end; row += kUnitAmaxRows) {
    UnitInputs<T> in[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      in[i] = fetch_unit<UnitReads<T, kGated, false>>(a.unit, a.dh, a.dh_ld,
                                                      min(row + i * kWarps, end - 1), col);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t at = row + i * kWarps;
      if (at >= end) break;
      const auto put = [&](void* out, int64_t ld, const Vec8<T>& v) {
        if (out != nullptr) store8(static_cast<T*>(out) + at * ld + col, v);
      };
      if constexpr (kBackward) {
        const UnitResults<T> d = unit_backward<T, kGated>(in[i].gate, in[i].up, in[i].dh, a.unit);
        put(a.d_gate, a.d_ld, d.gate);
        if constexpr (kGated) put(a.d_up, a.d_ld, d.up);
        put(a.h, a.h_ld, d.h);
      } else {
        put(a.h, a.h_ld, unit_forward<T, kGated>(in[i].gate, in[i].up, a.unit));
      }
    }
  }
}

}  // namespace

void mlp_values(const MlpValuesArgs& args, Stream stream) {
  check_unit(args.unit);
  require(args.unit.gate_scale == nullptr, "mlp_values reads no codes");
  require(on_16_bytes(args.dh) && on_16_bytes(args.d_gate) && on_16_bytes(args.d_up) &&
              on_16_bytes(args.h) && args.dh_ld % 8 == 0 && args.d_ld % 8 == 0 &&
              args.h_ld % 8 == 0,
          "mlp_values expects 16-byte aligned rows");
  const UnitAmaxPlan plan = plan_unit_amax(args.unit, current_device(args.unit.device).sm_count);
  const ValuesParams params{args, plan};
  const dim3 grid(static_cast<unsigned>(plan.col_tiles), static_cast<unsigned>(plan.row_chunks));
  const auto go = [&](auto kernel) { launch(kernel, grid, kThreads, stream, params); };
  const bool gated = args.unit.up != nullptr;
  dispatch_input(args.unit.dtype, [&](auto input) {
    using T = typename decltype(input)::type;
    if (args.dh != nullptr) {
      gated ? go(unit_values_kernel<T, true, true>) : go(unit_values_kernel<T, false, true>);
    } else {
      gated ? go(unit_values_kernel<T, true, false>) : go(unit_values_kernel<T, false, false>);
    }
  });
}

}  // namespace fp8::core
