// RMSNorm, with or without a residual added before, and LayerNorm, forward: one pass. A row is held
// in the registers of 1 to 512 threads, up to 32 columns each; short rows share a block. A longer
// row is read again for each sum over it and for y. Bound by bandwidth: 2 + 2 bytes an element
// (bf16), 4 + 4 with a residual.
#include "core/norm/norm.cuh"

namespace fp8::core {
namespace {

enum class Kind : uint8_t { kRms, kAddRms, kLayer };

template <typename T, typename W>
struct ForwardParams {
  RowsOf<const T> x;
  RowsOf<const T> residual;
  RowsOf<T> y;
  RowsOf<T> sum;
  NormParameters<W> of;
  float* mean;
  float* rstd;
  int64_t rows;
  int cols;
  float eps;
  int threads_per_row;
  int iterations;
};

// Blocks of 512 threads to a multiprocessor, hence registers a thread: 64 or 128.
template <typename T, Kind kKind, bool kLong>
constexpr int kForwardBlocks = sizeof(T) == 4 || kLong || kKind == Kind::kLayer ? 1 : 2;

// kLong: more than one iteration.
template <typename T, typename W, Kind kKind, bool kLong>
__global__ void __launch_bounds__(kMaxRowThreads, (kForwardBlocks<T, kKind, kLong>))
    norm_forward_kernel(const ForwardParams<T, W> p) {
  constexpr bool kLayer = kKind == Kind::kLayer;
  constexpr int kVectors = kNormVectors;
  __shared__ float scratch[2][kMaxRowThreads / 32];
  const int slot = static_cast<int>(threadIdx.x) / p.threads_per_row;
  const int thread = static_cast<int>(threadIdx.x) % p.threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / p.threads_per_row) + slot;
  const bool exists = row < p.rows;
  const int64_t safe = exists ? row : p.rows - 1;
  const T* x = p.x.row(safe);
  const T* residual = kKind == Kind::kAddRms ? p.residual.row(safe) : nullptr;
  const int stride = p.threads_per_row * 8;
  const int iterations = kLong ? p.iterations : 1;

  Vec8<T> v[kVectors];
  const auto col_of = [&](int iteration, int i) {
    return (iteration * kVectors + i) * stride + thread * 8;
  };
  const auto load = [&](int iteration) {
    Vec8<T> other[kKind == Kind::kAddRms ? kVectors : 1];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int col = col_of(iteration, i);
      v[i] = load8(x + col, of_eight(p.cols - col), p.x.vectorized);
      if constexpr (kKind == Kind::kAddRms) {
        other[i] = load8(residual + col, of_eight(p.cols - col), p.residual.vectorized);
      }
    }
    if constexpr (kKind == Kind::kAddRms) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float both[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) both[j] = add(v[i].get(j), other[i].get(j));
        v[i] = rounded8<T>(both);
      }
    }
  };
  // f(i, col, valid) of each of the thread's eights; those past the row have none valid.
  const auto for_eights = [&](const auto& f) {
    for (int iteration = 0; iteration < iterations; ++iteration) {
      if (kLong) load(iteration);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int col = col_of(iteration, i);
        f(i, col, of_eight(p.cols - col));
      }
    }
  };
  if (!kLong) load(0);

  const auto cols = static_cast<float>(p.cols);
  float total[1] = {0.0F};
  float mean = 0.0F;
  if constexpr (kLayer) {
    for_eights([&](int i, int /*col*/, int /*valid*/) {
      float terms[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) terms[j] = v[i].get(j);
      total[0] = add(total[0], joined8(terms));
    });
    sum_over_row(total, slot, p.threads_per_row, scratch[0]);
    mean = divide(total[0], cols);
    total[0] = 0.0F;
  }
  for_eights([&](int i, int /*col*/, int valid) {
    float terms[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float d = v[i].get(j);
      if constexpr (kLayer) d = j < valid ? sub(d, mean) : 0.0F;
      terms[j] = mul(d, d);
    }
    total[0] = add(total[0], joined8(terms));
  });
  sum_over_row(total, slot, p.threads_per_row, scratch[1]);
  const float rstd = rstd_of(total[0], cols, p.eps);

  if (!exists) return;
  if (thread == 0) {
    p.rstd[row] = rstd;
    if constexpr (kLayer) p.mean[row] = mean;
  }
  T* y = p.y.row(row);
  if (!kLong) forget_unpacked(v);
  for_eights([&](int i, int col, int valid) {
    if (valid <= 0) return;
    float factor[8];
    p.of.factors(col, valid, factor);
    float out[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = norm_hat<kLayer>(v[i].get(j), mean, rstd);
    if (!kLayer && p.of.round_first) round8<T>(out);
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = mul(out[j], factor[j]);
    if constexpr (kLayer) {
      if (p.of.bias != nullptr) {
        const Vec8<W> bias = load8(p.of.bias + col, valid, p.of.vectorized);
#pragma unroll
        for (int j = 0; j < 8; ++j) out[j] = add(out[j], bias.get(j));
      }
    }
    if constexpr (kKind == Kind::kAddRms) {
      store_first(p.sum.row(row) + col, v[i], valid, p.sum.vectorized);
    }
    store_first(y + col, rounded8<T>(out), valid, p.y.vectorized);
  });
}

template <typename T, typename W, Kind kKind>
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
    if (layer) return launch_forward<T, W, Kind::kLayer>(args, stream);
    if (args.residual != nullptr) return launch_forward<T, W, Kind::kAddRms>(args, stream);
    launch_forward<T, W, Kind::kRms>(args, stream);
  });
}

}  // namespace fp8::core
