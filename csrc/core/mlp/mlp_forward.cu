// An MLP's h in FP8: the passes of a quantization (core/quantize), each of which computes h from
// gate and up as it reads them. Tensorwise 4 and 4 + 1 bytes an element (bf16), delayed 4 + 1; rows
// and blocks are in mlp_rows.cu and mlp_blockwise.cu. Bound by bandwidth.
#include <algorithm>
#include <variant>

#include "core/device/device.h"
#include "core/mlp/forward_launchers.h"
#include "core/mlp/plan.h"
#include "core/mlp/screen.cuh"
#include "core/mlp/unit.cuh"
#include "core/quantize/cast.cuh"
#include "core/quantize/settle_delayed.cuh"
#include "core/quantize/statistics.cuh"

namespace fp8::core {
namespace {

// The amax of h, of what may raise it alone (screen.cuh); as statistics_kernel goes over h.
template <typename Source>
__global__ void __launch_bounds__(kThreads, 3)
    unit_screened_amax_kernel(const From<Source, StatisticsParams> from) {
  using T = typename Source::Element;
  constexpr bool kGated = Source::kIsGated;
  __shared__ uint32_t of_block;
  const StatisticsParams& p = from.to;
  let_next_start();
  if (threadIdx.x == 0) of_block = 0;
  __syncthreads();
  const int64_t chunk = p.from_below ? gridDim.y - 1 - blockIdx.y : blockIdx.y;
  const int64_t col = blockIdx.x * kStatisticsCols + threadIdx.x % 32 * 8;
  const int64_t begin = chunk * p.plan.rows_per_chunk;
  const int64_t end = min(begin + p.plan.rows_per_chunk, p.plan.rows);
  RisingAmax known(&of_block);
  for (int64_t row = begin + threadIdx.x / 32; row < end; row += kWarps) {
    const int64_t at = from.source.row(row);
    typename Source::Raw raw[kVectors];
#pragma unroll  // the last columns again where there are none
    for (int i = 0; i < kVectors; ++i) raw[i] = from.source.fetch(at, col + i * 256);
    known.exchange();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!known.may_rise(h_estimate<T, kGated>(raw[i].gate, raw[i].up))) continue;
      known.raise(
          amax_bits(unit_forward_of<Silu, T, kGated>(raw[i].gate, raw[i].up, from.source.args)));
    }
  }
  known.exchange();
  __syncthreads();
  wait_for_previous();
  const bool exists = blockIdx.x < p.plan.col_tiles && chunk < p.plan.row_chunks;
  if (threadIdx.x == 0 && exists) p.tensor_amax[chunk * p.plan.col_tiles + blockIdx.x] = of_block;
}

class UnitPasses : public QuantizePasses {
 public:
  explicit UnitPasses(const MlpUnitArgs& unit) : unit_(unit) {}

  void statistics(const StatisticsParams& params, cudaStream_t stream) const override {
    const auto cx = static_cast<unsigned>(params.plan.cluster_x);
    const auto cy = static_cast<unsigned>(params.plan.cluster_y);
    const dim3 grid(static_cast<unsigned>(round_up(params.plan.col_tiles, cx)),
                    static_cast<unsigned>(round_up(params.plan.row_chunks, cy)));
    with_unit_source(unit_, [&](auto source) {
      using Source = decltype(source);
      const auto go = [&](auto kernel) {
        launch(kernel, grid, kThreads, stream, From<Source, StatisticsParams>{source, params},
               {.cluster = dim3(cx, cy), .pdl = params.pdl});
      };
      if constexpr (std::is_same_v<typename Source::Element, __nv_bfloat16>) {
        if (has_screen(unit_)) return go(unit_screened_amax_kernel<Source>);
      }
      go(statistics_kernel<Source, kTensorAmax>);
    });
  }

  void cast(const CastParams& params, Dtype /*dtype*/, Granularity /*granularity*/,
            cudaStream_t stream) const override {
    const auto grid = static_cast<unsigned>(params.plan.col_tiles * params.plan.strips);
    const bool delayed = params.static_scale == nullptr && params.tensor_amax == nullptr;
    with_unit_source(unit_, [&](auto source) {
      using Source = decltype(source);
      const auto go = [&](auto kernel) {
        launch(kernel, grid, kThreads, stream, From<Source, CastParams>{source, params},
               {.pdl = params.pdl});
      };
      if (delayed) {
        go(cast_kernel<Source, E4M3, ScaleOf::kDelayed, true, false>);
      } else {
        go(cast_kernel<Source, E4M3, ScaleOf::kTensorwise, true, false>);
      }
    });
  }

  void settle_delayed(const CastParams& params, unsigned blocks, Dtype /*dtype*/,
                      cudaStream_t stream) const override {
    with_unit_source(unit_, [&](auto source) {
      using Source = decltype(source);
      launch(settle_delayed_kernel<Source, E4M3, true, false>, blocks, kThreads, stream,
             From<Source, CastParams>{source, params}, {.pdl = params.pdl});
    });
  }

  void rowwise(const RowwiseParams& params, Dtype /*dtype*/, cudaStream_t stream) const override {
    launch_unit_rowwise(unit_, params, stream);
  }
  void blockwise(const BlockwiseParams& params, Dtype /*dtype*/, Granularity granularity,
                 cudaStream_t stream) const override {
    require(granularity == Granularity::kBlock1x128, "mlp_forward makes blocks of 1 x 128");
    launch_unit_blockwise(unit_, params, stream);
  }

 private:
  MlpUnitArgs unit_;
};

QuantizeArgs of_unit(const MlpForwardArgs& args) {
  require(args.dtype == Dtype::kE4M3, "mlp_forward makes e4m3");
  return {.x = args.unit.gate,
          .x_dtype = args.unit.dtype,
          .rows = args.unit.rows,
          .cols = args.unit.features,
          .ld = -1,
          .dtype = args.dtype,
          .granularity = args.granularity,
          .power_of_two = args.power_of_two,
          .data = args.data,
          .scale = args.scale,
          .scaling = args.scaling,
          .amax_out = args.amax_out,
          .workspace = args.workspace,
          .device = args.unit.device};
}

}  // namespace

size_t mlp_forward_workspace_bytes(const MlpForwardArgs& args) {
  return quantize_workspace_bytes(of_unit(args));
}

void mlp_forward(const MlpForwardArgs& args, Stream stream) {
  check_unit(args.unit);
  require(args.unit.gate_scale == nullptr, "mlp_forward reads no codes");
  quantize_with(UnitPasses(args.unit), of_unit(args), stream);
}

}  // namespace fp8::core
