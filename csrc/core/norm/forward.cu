// RMSNorm, with or without a residual added before, and LayerNorm, forward: one pass. A row is held
// in the registers of 1 to 512 threads, up to 32 columns each; short rows share a block, and of
// many rows a block takes several (forward_rows.cuh). A longer row is read again for each sum over
// it and for y. Bound by bandwidth: 2 + 2 bytes an element (bf16), 4 + 4 with a residual.
#include <array>
#include <atomic>

#include "core/device/device.h"
#include "core/device/shared_memory.h"
#include "core/norm/forward_rows.cuh"

namespace fp8::core {
namespace {

// Blocks of 512 threads to a multiprocessor, hence registers a thread: 64 or 128.
template <typename T, ForwardKind kKind, bool kLong>
constexpr int kForwardBlocks = sizeof(T) == 4 || kLong || kKind == ForwardKind::kLayer ? 1 : 2;

// kLong: more than one iteration.
template <typename T, typename W, ForwardKind kKind, bool kLong>
__global__ void __launch_bounds__(kMaxRowThreads, (kForwardBlocks<T, kKind, kLong>))
    norm_forward_kernel(const ForwardParams<T, W> p) {
  constexpr bool kAdds = kKind == ForwardKind::kAddRms;
  constexpr int kVectors = kNormVectors;
  __shared__ __align__(16) float scratch[2 * kSumScratch<1>];
  const RowThreads at(p.threads_per_row);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / p.threads_per_row) + at.slot;
  const bool exists = row < p.rows;
  const int64_t safe = exists ? row : p.rows - 1;
  const T* x = p.x.row(safe);
  const T* residual = kAdds ? p.residual.row(safe) : nullptr;
  const int iterations = kLong ? p.iterations : 1;

  Vec8<T> v[kVectors];
  const auto col_of = [&](int iteration, int i) {
    return ((iteration * kVectors + i) * p.threads_per_row + at.thread) * 8;
  };
  const auto load = [&](int iteration) {
    Vec8<T> other[kAdds ? kVectors : 1];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int col = col_of(iteration, i);
      v[i] = load8(x + col, of_eight(p.cols - col), p.x.vectorized);
      if constexpr (kAdds) {
        other[i] = load8(residual + col, of_eight(p.cols - col), p.residual.vectorized);
      }
    }
    if constexpr (kAdds) add_to(v, other);
  };
  const auto for_eights = [&](const auto& f) {
    for (int iteration = 0; iteration < iterations; ++iteration) {
      if (kLong) load(iteration);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int col = col_of(iteration, i);
        f(v[i], i, col, of_eight(p.cols - col));
      }
    }
  };
  const auto scale = [&](float(&out)[8], int /*i*/, int col, int valid) {
    float factor[8];
    p.of.factors(col, valid, factor);
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = mul(out[j], factor[j]);
    if constexpr (kKind == ForwardKind::kLayer) {
      if (p.of.bias != nullptr) {
        const Vec8<W> bias = load8(p.of.bias + col, valid, p.of.vectorized);
#pragma unroll
        for (int j = 0; j < 8; ++j) out[j] = add(out[j], bias.get(j));
      }
    }
  };
  if (!kLong) load(0);
  const RowSums<1> sums(at.slot, p.threads_per_row, scratch);
  norm_row<kKind>(p, row, exists, at, sums, 0, for_eights, scale, [&] {
    if (!kLong) forget_unpacked(v);
  });
}

// Where each slot of a block has this many rows, blocks stay.
constexpr int kRowsThatStay = 4;

template <typename T, typename W, ForwardKind kKind>
bool launch_rows(ForwardParams<T, W> params, Stream stream) {
  constexpr int kBlocks = kStayingBlocks<kKind>;
  constexpr size_t kReserved = 1024;  // of each block's shared memory
  const int blocks = current_device().sm_count * kBlocks;
  const int64_t slots = kMaxRowThreads / params.threads_per_row;
  if (params.rows < kRowsThatStay * slots * blocks) return false;
  const auto kernel = norm_forward_rows_kernel<T, W, kKind>;
  static std::array<std::atomic<int>, kMaxDevices> known{};
  const size_t room = shared_memory_of(reinterpret_cast<const void*>(kernel), known);
  const size_t tensors = kKind == ForwardKind::kAddRms ? 2 : 1;
  const size_t rows = tensors * sizeof(Vec8<T>) * kNormVectors * kMaxRowThreads;  // of all slots
  params.whole = params.cols % 8 == 0 && params.x.vectorized && params.residual.vectorized &&
                 params.sum.vectorized && params.y.vectorized;
  params.ahead = next_rows_in(room / kBlocks - kReserved * (kBlocks - 1), rows);
  launch(kernel, static_cast<unsigned>(blocks), kMaxRowThreads, stream, params,
         {.shared_bytes = rows * static_cast<size_t>(params.ahead + 1)});
  return true;
}

template <typename T, typename W, ForwardKind kKind>
void launch_forward(const NormForwardArgs& args, Stream stream) {
  const NormArgs& norm = args.norm;
  const NormPlan plan = plan_norm(norm.cols);
  const NormRows dense = contiguous_rows(norm.cols);
  const ForwardParams<T, W> params{
      .x = rows_of(static_cast<const T*>(args.x), args.x_rows),
      .residual = rows_of(static_cast<const T*>(args.residual), args.residual_rows),
      .y = rows_of(static_cast<T*>(args.y), dense),
      .sum = rows_of(static_cast<T*>(args.sum), dense),
      .of = parameters_of<W>(norm),
      .mean = args.mean,
      .rstd = args.rstd,
      .rows = norm.rows,
      .cols = static_cast<int>(norm.cols),
      .eps = args.eps,
      .threads_per_row = plan.threads_per_row,
      .iterations = plan.iterations};
  if constexpr (sizeof(T) == 2) {
    if (plan.iterations == 1 && launch_rows<T, W, kKind>(params, stream)) return;
  }
  const int slots = std::max(1, kNormForwardThreads / plan.threads_per_row);
  const auto blocks = static_cast<unsigned>(ceil_div(norm.rows, slots));
  const int threads = slots * plan.threads_per_row;
  if (plan.iterations > 1) {
    launch(norm_forward_kernel<T, W, kKind, true>, blocks, threads, stream, params);
  } else {
    launch(norm_forward_kernel<T, W, kKind, false>, blocks, threads, stream, params);
  }
}

}  // namespace

void norm_forward(const NormForwardArgs& args, Stream stream) {
  const bool layer = args.norm.form == NormForm::kLayer;
  require(!layer || args.residual == nullptr, "norm_forward adds a residual for RMSNorm only");
  dispatch_norm(args.norm, [&](auto element, auto parameter) {
    using T = typename decltype(element)::type;
    using W = typename decltype(parameter)::type;
    if (layer) return launch_forward<T, W, ForwardKind::kLayer>(args, stream);
    if (args.residual != nullptr) return launch_forward<T, W, ForwardKind::kAddRms>(args, stream);
    launch_forward<T, W, ForwardKind::kRms>(args, stream);
  });
}

}  // namespace fp8::core
