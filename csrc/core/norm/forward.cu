// RMSNorm, with or without a residual added before, and LayerNorm, forward: one pass. A row is held
// in the registers of 1 to 512 threads, up to 32 columns each; short rows share a block, and of
// many rows a block takes several (forward_rows.cuh). A longer row is read again for each sum over
// it and for y. Bound by bandwidth: 2 + 2 bytes an element (bf16), 4 + 4 with a residual. Where a
// tensorwise quantization of y follows, each block leaves its max |y| for it.
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

// kLong: more than one iteration. kAmax: max |y| of each block is left too.
template <typename T, typename W, ForwardKind kKind, bool kLong, bool kAmax>
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
  OutputAmax<T, kAmax> amax;
  const auto before_output = [&] {
    if (!kLong) forget_unpacked(v);
  };
  norm_row<kKind>(p, row, exists, at, sums, 0, for_eights, scale, before_output, amax);
  amax.leave(p.amax);
}

// Where each slot of a block has this many rows, blocks stay.
constexpr int kRowsThatStay = 4;

// Blocks that stay, or 0 where there are too few rows, too long rows or wide elements for that.
int64_t staying_blocks(const NormArgs& norm, const NormPlan& plan, int per_multiprocessor) {
  if (norm.dtype == Dtype::kFloat32 || plan.iterations > 1) return 0;
  const int64_t blocks = int64_t{current_device().sm_count} * per_multiprocessor;
  const int64_t slots = kMaxRowThreads / plan.threads_per_row;
  return norm.rows < kRowsThatStay * slots * blocks ? 0 : blocks;
}

// Rows of a block that goes.
int64_t slots_of(const NormPlan& plan) {
  return std::max(1, kNormForwardThreads / plan.threads_per_row);
}

template <bool kAmax, typename T, typename W, ForwardKind kKind>
void launch_staying(ForwardParams<T, W> params, int64_t blocks, Stream stream) {
  constexpr int kBlocks = kStayingBlocks<kKind>;
  constexpr size_t kReserved = 1024;  // of each block's shared memory
  const auto kernel = norm_forward_rows_kernel<T, W, kKind, kAmax>;
  static std::array<std::atomic<int>, kMaxDevices> known{};
  const size_t room = shared_memory_of(reinterpret_cast<const void*>(kernel), known);
  const size_t tensors = kKind == ForwardKind::kAddRms ? 2 : 1;
  const size_t rows = tensors * sizeof(Vec8<T>) * kNormVectors * kMaxRowThreads;  // of all slots
  params.whole = params.cols % 8 == 0 && params.x.vectorized && params.residual.vectorized &&
                 params.sum.vectorized && params.y.vectorized;
  params.ahead = next_rows_in(room / kBlocks - kReserved * (kBlocks - 1), rows);
  launch(kernel, static_cast<unsigned>(blocks), kMaxRowThreads, stream, params,
         {.shared_bytes = rows * static_cast<size_t>(params.ahead + 1)});
}

template <bool kAmax, typename T, typename W, ForwardKind kKind>
void launch_short(const ForwardParams<T, W>& params, const NormArgs& norm, const NormPlan& plan,
                  Stream stream) {
  const int64_t staying = staying_blocks(norm, plan, kStayingBlocks<kKind>);
  if constexpr (sizeof(T) == 2) {
    if (staying > 0) return launch_staying<kAmax, T, W, kKind>(params, staying, stream);
  }
  const int64_t slots = slots_of(plan);
  launch(norm_forward_kernel<T, W, kKind, false, kAmax>,
         static_cast<unsigned>(ceil_div(norm.rows, slots)),
         static_cast<int>(slots) * plan.threads_per_row, stream, params);
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
      .iterations = plan.iterations,
      .amax = args.y_amax};
  if (plan.iterations > 1) {
    return launch(norm_forward_kernel<T, W, kKind, true, false>, static_cast<unsigned>(norm.rows),
                  kMaxRowThreads, stream, params);
  }
  if constexpr (sizeof(T) == 2) {
    if (args.y_amax != nullptr) return launch_short<true, T, W, kKind>(params, norm, plan, stream);
  }
  launch_short<false, T, W, kKind>(params, norm, plan, stream);
}

}  // namespace

int64_t norm_amax_parts(const NormForwardArgs& args) {
  const NormArgs& norm = args.norm;
  const NormPlan plan = plan_norm(norm.cols);
  if (norm.dtype == Dtype::kFloat32 || plan.iterations > 1 || norm.rows == 0) return 0;
  const int per_multiprocessor = norm.form == NormForm::kLayer ? kStayingBlocks<ForwardKind::kLayer>
                                 : args.residual != nullptr ? kStayingBlocks<ForwardKind::kAddRms>
                                                            : kStayingBlocks<ForwardKind::kRms>;
  const int64_t staying = staying_blocks(norm, plan, per_multiprocessor);
  return staying > 0 ? staying : ceil_div(norm.rows, slots_of(plan));
}

void norm_forward(const NormForwardArgs& args, Stream stream) {
  const bool layer = args.norm.form == NormForm::kLayer;
  require(!layer || args.residual == nullptr, "norm_forward adds a residual for RMSNorm only");
  require(args.y_amax == nullptr || norm_amax_parts(args) > 0,
          "norm_forward leaves maxima of elements of 16 bits in rows that fit into a block");
  dispatch_norm(args.norm, [&](auto element, auto parameter) {
    using T = typename decltype(element)::type;
    using W = typename decltype(parameter)::type;
    if (layer) return launch_forward<T, W, ForwardKind::kLayer>(args, stream);
    if (args.residual != nullptr) return launch_forward<T, W, ForwardKind::kAddRms>(args, stream);
    launch_forward<T, W, ForwardKind::kRms>(args, stream);
  });
}

}  // namespace fp8::core
