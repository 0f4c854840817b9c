// Gradients of RMSNorm and LayerNorm. One pass: blocks stay, and each of their slots (the threads
// of a row) takes every so-manyth row, holds x and dy of it in registers, and keeps the sums for
// weight and bias of its columns in registers over all its rows. A block leaves one partial result,
// and a second, small launch adds these up. Rows that do not fit into registers are read twice for
// dx and once more, by columns, for the sums. Bound by bandwidth: 2 + 2 + 2 bytes an element
// (bf16), 2 more where a residual's gradient is added.
#include "core/device/device.h"
#include "core/norm/norm.cuh"

namespace fp8::core {
namespace {

template <typename T, typename W>
struct BackwardParams {
  RowsOf<const T> dy;
  RowsOf<const T> x;
  RowsOf<const T> addend;
  RowsOf<T> dx;
  NormParameters<W> of;
  const float* mean;
  const float* rstd;
  float* weight_parts;  // [parts, cols], or nullptr
  float* bias_parts;    // the same
  int64_t rows;
  int cols;
  int threads_per_row;
};

// What a thread makes of eight elements: g = dy * factor, rounded where autograd rounds it, xhat,
// and what dy adds to the weight's gradient.
template <typename T, typename W, bool kLayer>
struct Eight {
  float dy[8];
  float x[8];
  float hat[8];
  float g[8];

  __device__ __forceinline__ Eight(const NormParameters<W>& of, const Vec8<T>& dy_values,
                                   const Vec8<T>& x_values, float mean, float rstd, int col,
                                   int valid) {
    float factor[8];
    of.factors(col, valid, factor);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      dy[j] = dy_values.get(j);
      x[j] = x_values.get(j);
      hat[j] = norm_hat<kLayer>(x[j], mean, rstd);
      g[j] = mul(dy[j], factor[j]);
    }
    if (!kLayer && of.round_first) round8<T>(g);
  }
  // The sums over a row: of g * x, or of g * xhat and of g. What is not there is 0 in dy.
  __device__ __forceinline__ void add_to(float (&totals)[kLayer ? 2 : 1]) const {
    float terms[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) terms[j] = mul(g[j], kLayer ? hat[j] : x[j]);
    totals[0] = add(totals[0], joined8(terms));
    if constexpr (kLayer) totals[1] = add(totals[1], joined8(g));
  }
  __device__ __forceinline__ void weight_terms(const NormParameters<W>& of,
                                               float (&terms)[8]) const {
    const bool rounds = !kLayer && of.round_first;
#pragma unroll
    for (int j = 0; j < 8; ++j) terms[j] = hat[j];
    if (rounds) round8<T>(terms);
#pragma unroll
    for (int j = 0; j < 8; ++j) terms[j] = mul(dy[j], terms[j]);
    if (rounds) round8<T>(terms);
  }
};

// T(dx), and T(addend + T(dx)) where there is one.
template <typename T, typename W>
__device__ __forceinline__ void store_dx(const BackwardParams<T, W>& p, int64_t row, int col,
                                         int valid, float (&dx)[8]) {
  Vec8<T> out = rounded8<T>(dx);
  if (p.addend.data != nullptr) {
    const Vec8<T> addend = load8(p.addend.row(row) + col, valid, p.addend.vectorized);
#pragma unroll
    for (int j = 0; j < 8; ++j) dx[j] = add(addend.get(j), out.get(j));
    out = rounded8<T>(dx);
  }
  store_first(p.dx.row(row) + col, out, valid, p.dx.vectorized);
}

// Adds the slots' sums [kVectors][8] of a block up and writes them: parts [cols] of this block.
// shared: [vectors * threads_per_row * 8].
template <int kVectors>
__device__ __forceinline__ void leave_part(float (&sums)[kVectors][8], int threads_per_row,
                                           int cols, float* shared, float* parts) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int offset = threads_per_row; offset < 32; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[i][j] = add(sums[i][j], __shfl_xor_sync(0xFFFFFFFFU, sums[i][j], offset));
      }
    }
  }
  const int group_threads = max(threads_per_row, 32);
  const int group = static_cast<int>(threadIdx.x) / group_threads;
  const int groups = kNormBackwardThreads / group_threads;
  const int thread = static_cast<int>(threadIdx.x) % group_threads;
  const bool writes = threads_per_row >= 32 || lane < threads_per_row;
  for (int turn = 0; turn < groups; ++turn) {
    if (turn == group && writes) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int col = (i * threads_per_row + thread) * 8;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (turn > 0) sums[i][j] = add(shared[col + j], sums[i][j]);
          if (turn + 1 < groups) {
            shared[col + j] = sums[i][j];
          } else if (col + j < cols) {
            parts[col + j] = sums[i][j];
          }
        }
      }
    }
    if (turn + 1 < groups) __syncthreads();
  }
}

template <typename T, typename W, bool kLayer>
__global__ void __launch_bounds__(kNormBackwardThreads, 1)
    norm_backward_kernel(const BackwardParams<T, W> p) {
  constexpr int kVectors = norm_backward_vectors(kLayer, kDtypeOf<T>);
  constexpr int kSums = kLayer ? 2 : 1;
  // Of rows that share a block: at most 256 threads of kVectors eights.
  __shared__ float shared[kVectors * 8 * kNormBackwardThreads / 2];
  __shared__ float scratch[2][kSums * kNormBackwardThreads / 32];
  const int slots = kNormBackwardThreads / p.threads_per_row;
  const int slot = static_cast<int>(threadIdx.x) / p.threads_per_row;
  const int thread = static_cast<int>(threadIdx.x) % p.threads_per_row;
  const int stride = p.threads_per_row * 8;
  const int64_t step = static_cast<int64_t>(gridDim.x) * slots;
  const auto cols = static_cast<float>(p.cols);

  float dweight[kVectors][8];
  float dbias[kLayer ? kVectors : 1][8];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      dweight[i][j] = 0.0F;
      if constexpr (kLayer) dbias[i][j] = 0.0F;
    }
  }
  // Slots of one warp take as many turns, so that they meet in its shuffles.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * slots + slot;
  const int64_t warp_first = first - (p.threads_per_row < 32 ? slot % (32 / p.threads_per_row) : 0);
  int turn = 0;
  for (int64_t base = warp_first; base < p.rows; base += step, turn ^= 1) {
    const int64_t row = base + (first - warp_first);
    const bool exists = row < p.rows;
    const int cols_here = exists ? p.cols : 0;
    const int64_t safe = exists ? row : p.rows - 1;
    const T* x_row = p.x.row(safe);
    const T* dy_row = p.dy.row(safe);
    Vec8<T> x[kVectors];
    Vec8<T> dy[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int col = i * stride + thread * 8;
      x[i] = load8(x_row + col, of_eight(cols_here - col), p.x.vectorized);
      dy[i] = load8(dy_row + col, of_eight(cols_here - col), p.dy.vectorized);
    }
    const float rstd = __ldg(p.rstd + safe);
    const float mean = kLayer ? __ldg(p.mean + safe) : 0.0F;

    float totals[kSums] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int col = i * stride + thread * 8;
      const int valid = of_eight(cols_here - col);
      if (valid <= 0) continue;
      const Eight<T, W, kLayer> eight(p.of, dy[i], x[i], mean, rstd, col, valid);
      float terms[8];
      eight.weight_terms(p.of, terms);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        dweight[i][j] = add(dweight[i][j], terms[j]);
        if constexpr (kLayer) dbias[i][j] = add(dbias[i][j], eight.dy[j]);
      }
      eight.add_to(totals);
    }
    if (p.dx.data == nullptr) continue;
    sum_over_row(totals, slot, p.threads_per_row, scratch[turn]);
    const NormGradient row_gradient =
        norm_gradient<kLayer>(kLayer ? totals[kSums - 1] : 0.0F, totals[0], rstd, cols);
    forget_unpacked(x);
    forget_unpacked(dy);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int col = i * stride + thread * 8;
      const int valid = of_eight(cols_here - col);
      if (valid <= 0) continue;
      const Eight<T, W, kLayer> eight(p.of, dy[i], x[i], mean, rstd, col, valid);
      float dx[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        dx[j] = norm_dx<kLayer>(eight.g[j], eight.x[j], eight.hat[j], cols, row_gradient);
      }
      store_dx(p, row, col, valid, dx);
    }
  }
  let_next_start();
  const int64_t part = static_cast<int64_t>(blockIdx.x) * p.cols;
  if (p.weight_parts != nullptr) {
    leave_part(dweight, p.threads_per_row, p.cols, shared, p.weight_parts + part);
  }
  if constexpr (kLayer) {
    if (p.bias_parts != nullptr) {
      __syncthreads();
      leave_part(dbias, p.threads_per_row, p.cols, shared, p.bias_parts + part);
    }
  }
}

// dx of rows that do not fit into registers: a block reads its row twice.
template <typename T, typename W, bool kLayer>
__global__ void __launch_bounds__(kMaxRowThreads)
    norm_backward_long_kernel(const BackwardParams<T, W> p) {
  constexpr int kSums = kLayer ? 2 : 1;
  __shared__ float scratch[kSums * kMaxRowThreads / 32];
  const int64_t row = blockIdx.x;
  const T* x_row = p.x.row(row);
  const T* dy_row = p.dy.row(row);
  const float rstd = __ldg(p.rstd + row);
  const float mean = kLayer ? __ldg(p.mean + row) : 0.0F;
  const auto cols = static_cast<float>(p.cols);
  // f(eight, col, valid) of each of the thread's eights.
  const auto for_eights = [&](const auto& f) {
    for (int col = static_cast<int>(threadIdx.x) * 8; col < p.cols; col += kMaxRowThreads * 8) {
      const int valid = of_eight(p.cols - col);
      f(Eight<T, W, kLayer>(p.of, load8(dy_row + col, valid, p.dy.vectorized),
                            load8(x_row + col, valid, p.x.vectorized), mean, rstd, col, valid),
        col, valid);
    }
  };
  float totals[kSums] = {};
  for_eights(
      [&](const Eight<T, W, kLayer>& eight, int /*col*/, int /*valid*/) { eight.add_to(totals); });
  sum_over_row(totals, 0, kMaxRowThreads, scratch);
  const NormGradient row_gradient =
      norm_gradient<kLayer>(kLayer ? totals[kSums - 1] : 0.0F, totals[0], rstd, cols);
  for_eights([&](const Eight<T, W, kLayer>& eight, int col, int valid) {
    float dx[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      dx[j] = norm_dx<kLayer>(eight.g[j], eight.x[j], eight.hat[j], cols, row_gradient);
    }
    store_dx(p, row, col, valid, dx);
  });
}

// And the sums for weight and bias: block (x, y) has 8 * kThreads columns and every gridDim.y-th
// row.
template <typename T, typename W, bool kLayer>
__global__ void __launch_bounds__(kThreads) norm_columns_kernel(const BackwardParams<T, W> p) {
  const int col = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * 8;
  if (col >= p.cols) return;
  const int valid = of_eight(p.cols - col);
  float dweight[8] = {};
  float dbias[8] = {};
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const float mean = kLayer ? __ldg(p.mean + row) : 0.0F;
    const Eight<T, W, kLayer> eight(p.of, load8(p.dy.row(row) + col, valid, p.dy.vectorized),
                                    load8(p.x.row(row) + col, valid, p.x.vectorized), mean,
                                    __ldg(p.rstd + row), col, valid);
    float terms[8];
    eight.weight_terms(p.of, terms);
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

template <typename T, typename W, bool kLayer>
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
      .threads_per_row = plan.threads_per_row};
  const auto blocks = static_cast<unsigned>(parts.parts);
  if (plan.iterations > 1) {
    if (args.dx != nullptr) {
      launch(norm_backward_long_kernel<T, W, kLayer>, static_cast<unsigned>(norm.rows),
             kMaxRowThreads, stream, params);
    }
    if (sums) {
      const auto tiles = static_cast<unsigned>(ceil_div(norm.cols, int64_t{8} * kThreads));
      launch(norm_columns_kernel<T, W, kLayer>, dim3(tiles, blocks), kThreads, stream, params);
    }
  } else {
    launch(norm_backward_kernel<T, W, kLayer>, blocks, kNormBackwardThreads, stream, params);
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
         dim3(32, kNormLanes), stream, finish,
         {.pdl = plan.iterations == 1 && has_hopper_launches(device)});
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
    if (layer) {
      launch_backward<T, W, true>(args, stream);
    } else {
      launch_backward<T, W, false>(args, stream);
    }
  });
}

}  // namespace fp8::core
