// Gradients of RMSNorm and LayerNorm. One pass (backward_rows.cuh): a block leaves one partial
// result for weight and bias, and a second, small launch adds these up. Rows that do not fit into a
// block's registers are read twice for dx and once more, by columns, for the sums. Bound by
// bandwidth: 2 + 2 + 2 bytes an element (bf16), 2 more where a residual's gradient is added.
#include <array>
#include <atomic>

#include "core/device/device.h"
#include "core/device/shared_memory.h"
#include "core/norm/backward_rows.cuh"

namespace fp8::core {
namespace {

template <BackwardKind kKind, typename T, typename W>
__device__ __forceinline__ Eight<T, kKind> eight_of(const BackwardParams<T, W>& p, int64_t row,
                                                    int col, int valid,
                                                    const RowStatistics& statistics) {
  const HeldParameter<W, 1> weight(p.of.weight, p.of.vectorized, 1.0F, col, 0, p.cols);
  return {load8(p.dy.row(row) + col, valid, p.dy.vectorized),
          load8(p.x.row(row) + col, valid, p.x.vectorized), weight.get(0, col, valid), p.of.offset,
          statistics};
}

// dx of rows that do not fit into a block's registers: a block reads its row twice.
template <typename T, typename W, BackwardKind kKind>
__global__ void __launch_bounds__(kMaxRowThreads)
    norm_backward_long_kernel(const BackwardParams<T, W> p) {
  using Eight = Eight<T, kKind>;
  constexpr bool kLayer = Eight::kLayer;
  constexpr int kSums = Eight::kSums;
  __shared__ __align__(16) float scratch[kSumScratch<kSums>];
  const int64_t row = blockIdx.x;
  const RowStatistics statistics = statistics_of<kKind>(p, row);
  const auto cols = static_cast<float>(p.cols);
  // f(eight, col, valid) of each of the thread's eights.
  const auto for_eights = [&](const auto& f) {
    for (int col = static_cast<int>(threadIdx.x) * 8; col < p.cols; col += kMaxRowThreads * 8) {
      const int valid = of_eight(p.cols - col);
      f(eight_of<kKind>(p, row, col, valid, statistics), col, valid);
    }
  };
  float totals[kSums] = {};
  for_eights([&](const Eight& eight, int /*col*/, int valid) {
    float terms[kSums];
    eight.row_terms(valid, terms);
#pragma unroll
    for (int k = 0; k < kSums; ++k) totals[k] = add(totals[k], terms[k]);
  });
  RowSums<kSums>(0, kMaxRowThreads, scratch).join(totals, 0);
  const NormGradient of_row =
      norm_gradient<kLayer>(kLayer ? totals[kSums - 1] : 0.0F, totals[0], statistics.rstd, cols);
  for_eights([&](const Eight& eight, int col, int valid) {
    float dx[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      dx[j] = norm_dx<kLayer>(eight.g[j], eight.x[j], eight.hat[j], cols, of_row);
    }
    Vec8<T> out = rounded8<T>(dx);
    if (p.addend.data != nullptr) {
      out = joined_dx(load8(p.addend.row(row) + col, valid, p.addend.vectorized), out);
    }
    store_first(p.dx.row(row) + col, out, valid, p.dx.vectorized);
  });
}

// And the sums for weight and bias: block (x, y) has 8 * kThreads columns and every gridDim.y-th
// row.
template <typename T, typename W, BackwardKind kKind>
__global__ void __launch_bounds__(kThreads) norm_columns_kernel(const BackwardParams<T, W> p) {
  constexpr bool kLayer = kKind == BackwardKind::kLayer;
  const int col = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * 8;
  if (col >= p.cols) return;
  const int valid = of_eight(p.cols - col);
  float dweight[8] = {};
  float dbias[8] = {};
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const auto eight = eight_of<kKind>(p, row, col, valid, statistics_of<kKind>(p, row));
    float terms[8];
    eight.weight_terms(terms);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      dweight[j] = add(dweight[j], terms[j]);
      if constexpr (kLayer) dbias[j] = add(dbias[j], eight.dy[j]);
    }
  }
  const int64_t place = static_cast<int64_t>(blockIdx.y) * p.cols + col;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j >= valid) continue;
    if (p.weight_parts != nullptr) p.weight_parts[place + j] = dweight[j];
    if (kLayer && p.bias_parts != nullptr) p.bias_parts[place + j] = dbias[j];
  }
}

struct FinishParams {
  const float* parts[2];  // [count, cols] each; of weight, of bias
  void* out[2];           // [cols]
  int64_t count;
  int64_t cols;
};

// Sums of partial results, in order: kNormLanes lanes to a column.
template <typename W>
__global__ void __launch_bounds__(32 * kNormLanes) norm_finish_kernel(const FinishParams p) {
  __shared__ float sums[kNormLanes][33];
  wait_for_previous();
  const auto lane = static_cast<int>(threadIdx.y);
  const int64_t col = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const float* parts = p.parts[blockIdx.y];
  float sum = 0.0F;
  if (col < p.cols) {
#pragma unroll 4
    for (int64_t i = lane; i < p.count; i += kNormLanes) sum = add(sum, parts[i * p.cols + col]);
  }
  sums[lane][threadIdx.x] = sum;
  __syncthreads();
  if (lane != 0 || col >= p.cols) return;
#pragma unroll
  for (int i = 1; i < kNormLanes; ++i) sum = add(sum, sums[i][threadIdx.x]);
  auto* out = static_cast<W*>(p.out[blockIdx.y]) + col;
  if constexpr (std::is_same_v<W, float>) {
    *out = sum;
  } else if constexpr (std::is_same_v<W, __nv_bfloat16>) {
    *out = __float2bfloat16_rn(sum);
  } else {
    *out = __float2half_rn(sum);
  }
}

template <bool kTwice, typename T, typename W, BackwardKind kKind>
void launch_rows(BackwardParams<T, W> params, unsigned blocks, Stream stream) {
  constexpr int kVectors =
      (kTwice ? 2 : 1) * norm_backward_vectors(kKind == BackwardKind::kLayer, kDtypeOf<T>);
  const auto kernel = norm_backward_kernel<T, W, kKind, kTwice>;
  static std::array<std::atomic<int>, kMaxDevices> known{};
  const size_t room = shared_memory_of(reinterpret_cast<const void*>(kernel), known);
  const size_t tensors = params.addend.data != nullptr ? 3 : 2;
  const size_t rows = tensors * sizeof(Vec8<T>) * kVectors * kNormBackwardThreads;  // of all slots
  params.whole = params.cols % 8 == 0 && params.x.vectorized && params.dy.vectorized &&
                 params.addend.vectorized && params.dx.vectorized;
  params.ahead = next_rows_in(room, rows);
  launch(kernel, blocks, kNormBackwardThreads, stream, params,
         {.shared_bytes = rows * static_cast<size_t>(params.ahead + 1)});
}

template <typename T, typename W, BackwardKind kKind>
void launch_backward(const NormBackwardArgs& args, Stream stream) {
  const NormArgs& norm = args.norm;
  const NormPlan plan = plan_norm_backward(norm);
  const DeviceInfo device = current_device();
  const NormParts parts = plan_norm_parts(plan, norm.rows, device.sm_count);
  const int64_t part_floats = parts.parts * norm.cols;
  const bool sums = args.dweight != nullptr || args.dbias != nullptr;
  require(!sums || args.workspace != nullptr, "norm_backward expects a workspace");
  const BackwardParams<T, W> params{
      .dy = rows_of(static_cast<const T*>(args.dy), args.dy_rows),
      .x = rows_of(static_cast<const T*>(args.x), args.x_rows),
      .addend = rows_of(static_cast<const T*>(args.add), args.add_rows),
      .dx = rows_of(static_cast<T*>(args.dx), contiguous_rows(norm.cols)),
      .of = parameters_of<W>(norm),
      .mean = args.mean,
      .rstd = args.rstd,
      .weight_parts = args.dweight != nullptr ? args.workspace : nullptr,
      .bias_parts = args.dbias != nullptr ? args.workspace + part_floats : nullptr,
      .rows = norm.rows,
      .cols = static_cast<int>(norm.cols),
      .threads_per_row = plan.threads_per_row,
      .pairs = plan.pairs};
  const auto blocks = static_cast<unsigned>(parts.parts);
  // Rows that take two iterations: the sums for LayerNorm's weight and bias, of 16-bit elements,
  // fit into registers. The order of all sums is that of the kernels that read a row again.
  constexpr bool kMayTwice = kKind == BackwardKind::kLayer && sizeof(T) == 2;
  const bool one_pass = plan.iterations == 1 || (kMayTwice && plan.iterations == 2);
  if (!one_pass) {
    if (args.dx != nullptr) {
      launch(norm_backward_long_kernel<T, W, kKind>, static_cast<unsigned>(norm.rows),
             kMaxRowThreads, stream, params);
    }
    if (sums) {
      const auto tiles = static_cast<unsigned>(ceil_div(norm.cols, int64_t{8} * kThreads));
      launch(norm_columns_kernel<T, W, kKind>, dim3(tiles, blocks), kThreads, stream, params);
    }
  } else if (plan.iterations == 1) {
    launch_rows<false, T, W, kKind>(params, blocks, stream);
  } else {
    if constexpr (kMayTwice) launch_rows<true, T, W, kKind>(params, blocks, stream);
  }
  if (!sums) return;
  FinishParams finish{.count = parts.parts, .cols = norm.cols};
  unsigned outputs = 0;
  const auto sum_up = [&](const float* of, void* out) {
    if (out == nullptr) return;
    finish.parts[outputs] = of;
    finish.out[outputs++] = out;
  };
  sum_up(params.weight_parts, args.dweight);
  sum_up(params.bias_parts, args.dbias);
  launch(norm_finish_kernel<W>, dim3(static_cast<unsigned>(ceil_div(norm.cols, 32)), outputs),
         dim3(32, kNormLanes), stream, finish, {.pdl = one_pass && has_hopper_launches(device)});
}

}  // namespace

int64_t norm_workspace_floats(const NormBackwardArgs& args) {
  const int64_t outputs = args.dbias != nullptr ? 2 : args.dweight != nullptr ? 1 : 0;
  if (outputs == 0) return 0;
  const NormPlan plan = plan_norm_backward(args.norm);
  const NormParts parts = plan_norm_parts(plan, args.norm.rows, current_device().sm_count);
  return outputs * parts.parts * args.norm.cols;
}

void norm_backward(const NormBackwardArgs& args, Stream stream) {
  const bool layer = args.norm.form == NormForm::kLayer;
  require(layer || args.dbias == nullptr, "norm_backward has a bias for LayerNorm only");
  dispatch_norm(args.norm, [&](auto element, auto parameter) {
    using T = typename decltype(element)::type;
    using W = typename decltype(parameter)::type;
    if (layer) return launch_backward<T, W, BackwardKind::kLayer>(args, stream);
    if constexpr (sizeof(T) == 2) {
      if (args.norm.form == NormForm::kRoundThenScale) {
        return launch_backward<T, W, BackwardKind::kRoundedRms>(args, stream);
      }
    }
    launch_backward<T, W, BackwardKind::kRms>(args, stream);
  });
}

}  // namespace fp8::core
