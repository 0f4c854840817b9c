// RMSNorm and LayerNorm on the CPU, in the order of additions of host/norm.h.
#include "cpu/norm.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <vector>

#include "cpu/grouped_rows.h"
#include "host/norm.h"

namespace fp8::cpu {
namespace {

using core::NormArgs;
using core::NormForm;
using core::NormPlan;
using core::NormRows;
using Floats = std::vector<float>;

int64_t offset_of(const NormRows& at, int64_t row) {
  const int64_t outer = row / at.n2;
  return outer / at.n1 * at.stride0 + outer % at.n1 * at.stride1 + row % at.n2 * at.stride2;
}

void round_all(Floats& values, Dtype dtype) {
  for (float& value : values) value = rounded(value, dtype);
}

// Sums over a row, as its threads on a GPU make them.
class RowSum {
 public:
  explicit RowSum(const NormPlan& plan) : threads_(plan.pairs ? 32 : plan.threads_per_row) {}

  // Of term(c) for each column c.
  template <typename F>
  float of(int64_t cols, const F& term) {
    std::fill(threads_.begin(), threads_.end(), 0.0F);
    const auto count = static_cast<int64_t>(threads_.size());
    for (int64_t begin = 0, thread = 0; begin < cols; begin += 8) {
      float v[8] = {};
      const int64_t valid = std::min<int64_t>(8, cols - begin);
      for (int64_t i = 0; i < valid; ++i) v[i] = term(begin + i);
      threads_[thread] += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
      thread = thread + 1 == count ? 0 : thread + 1;
    }
    const int64_t lanes = std::min<int64_t>(count, 32);
    float total = 0.0F;
    for (int64_t warp = 0; warp < count; warp += lanes) {
      float* of_warp = threads_.data() + warp;
      for (int64_t distance = lanes / 2; distance > 0; distance /= 2) {
        for (int64_t i = 0; i < distance; ++i) of_warp[i] += of_warp[i + distance];
      }
      total = warp == 0 ? of_warp[0] : total + of_warp[0];
    }
    return total;
  }

 private:
  Floats threads_;
};

// Weight or bias as floats.
Floats parameter(const void* values, const NormArgs& norm, float otherwise) {
  Floats found(norm.cols, otherwise);
  if (values != nullptr) read(values, norm.weight_dtype, 0, norm.cols, found.data());
  return found;
}

Floats factors(const NormArgs& norm) {
  Floats found = parameter(norm.weight, norm, 1.0F);
  const float offset = norm_offset(norm.form, norm.weight != nullptr);
  for (float& value : found) value = norm_factor(value, offset);
  return found;
}

template <bool kLayer>
void forward(const core::NormForwardArgs& args) {
  const NormArgs& norm = args.norm;
  const auto extent = static_cast<float>(norm.cols);
  const Floats factor = factors(norm);
  const Floats bias = parameter(args.norm.bias, norm, 0.0F);
  std::atomic<uint32_t> amax{0};
  at::parallel_for(0, norm.rows, grain(norm.cols), [&](int64_t begin, int64_t end) {
    RowSum sum(core::plan_norm(norm.cols));
    Floats x(norm.cols);
    Floats other(args.residual != nullptr ? norm.cols : 0);
    uint32_t of_rows = 0;
    for (int64_t row = begin; row < end; ++row) {
      read(args.x, norm.dtype, offset_of(args.x_rows, row), norm.cols, x.data());
      if (args.residual != nullptr) {
        read(args.residual, norm.dtype, offset_of(args.residual_rows, row), norm.cols,
             other.data());
        for (int64_t c = 0; c < norm.cols; ++c) x[c] += other[c];
        round_all(x, norm.dtype);
        write(args.sum, norm.dtype, row * norm.cols, norm.cols, x.data());
      }
      float mean = 0.0F;
      if constexpr (kLayer) {
        mean = sum.of(norm.cols, [&](int64_t c) { return x[c]; }) / extent;
        args.mean[row] = mean;
      }
      const float squares = sum.of(norm.cols, [&](int64_t c) {
        const float d = kLayer ? x[c] - mean : x[c];
        return d * d;
      });
      const float rstd = rstd_of(squares, extent, args.eps);
      args.rstd[row] = rstd;
      for (float& value : x) value = norm_hat<kLayer>(value, mean, rstd);
      if (norm.form == NormForm::kRoundThenScale) round_all(x, norm.dtype);
      for (int64_t c = 0; c < norm.cols; ++c) x[c] *= factor[c];
      if (norm.bias != nullptr) {
        for (int64_t c = 0; c < norm.cols; ++c) x[c] += bias[c];
      }
      write(args.y, norm.dtype, row * norm.cols, norm.cols, x.data());
      if (args.y_amax == nullptr) continue;
      round_all(x, norm.dtype);
      of_rows = std::max(of_rows, amax_bits(x.data(), norm.cols));
    }
    for (uint32_t known = amax; known < of_rows && !amax.compare_exchange_weak(known, of_rows);) {
    }
  });
  if (args.y_amax != nullptr) *args.y_amax = std::bit_cast<float>(amax.load());
}

// What a row of dy leaves: dx, and its terms of the gradients of weight and bias (which are dy).
template <bool kLayer>
struct BackwardRow {
  const core::NormBackwardArgs& args;
  const Floats& factor;
  RowSum sum{core::plan_norm_backward(args.norm)};
  Floats dy = Floats(args.norm.cols);
  Floats x = Floats(args.norm.cols);
  Floats hat = Floats(args.norm.cols);
  Floats g = Floats(args.norm.cols);

  void compute(int64_t row) {
    const NormArgs& norm = args.norm;
    const int64_t cols = norm.cols;
    const auto extent = static_cast<float>(cols);
    const bool round_first = norm.form == NormForm::kRoundThenScale;
    const float mean = kLayer ? args.mean[row] : 0.0F;
    const float rstd = args.rstd[row];
    read(args.dy, norm.dtype, offset_of(args.dy_rows, row), cols, dy.data());
    read(args.x, norm.dtype, offset_of(args.x_rows, row), cols, x.data());
    for (int64_t c = 0; c < cols; ++c) {
      hat[c] = norm_hat<kLayer>(x[c], mean, rstd);
      g[c] = dy[c] * factor[c];
    }
    if (round_first) round_all(g, norm.dtype);
    if (args.dx != nullptr) {
      const float product =
          sum.of(cols, [&](int64_t c) { return g[c] * (kLayer ? hat[c] : x[c]); });
      const float total = kLayer ? sum.of(cols, [&](int64_t c) { return g[c]; }) : 0.0F;
      const NormGradient of_row = norm_gradient<kLayer>(total, product, rstd, extent);
      for (int64_t c = 0; c < cols; ++c) g[c] = norm_dx<kLayer>(g[c], x[c], hat[c], extent, of_row);
      if (args.add != nullptr) {
        round_all(g, norm.dtype);
        read(args.add, norm.dtype, offset_of(args.add_rows, row), cols, x.data());
        for (int64_t c = 0; c < cols; ++c) g[c] = x[c] + g[c];
      }
      write(args.dx, norm.dtype, row * cols, cols, g.data());
    }
    if (round_first) round_all(hat, norm.dtype);
    for (int64_t c = 0; c < cols; ++c) hat[c] = dy[c] * hat[c];
    if (round_first) round_all(hat, norm.dtype);
  }
};

void add_up(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Slots [slots, cols] of a block to one, at `part`: those of a warp in pairs, then in order.
void join_slots(Floats& slots, const NormPlan& plan, int64_t cols, float* part) {
  const int64_t of_warp = std::max(1, 32 / plan.threads_per_row);
  const auto count = static_cast<int64_t>(slots.size()) / cols;
  for (int64_t distance = 1; distance < of_warp; distance *= 2) {
    for (int64_t s = 0; s + distance < count; s += 2 * distance) {
      add_up(slots.data() + (s + distance) * cols, cols, slots.data() + s * cols);
    }
  }
  std::copy_n(slots.data(), cols, part);
  for (int64_t s = of_warp; s < count; s += of_warp) add_up(slots.data() + s * cols, cols, part);
}

// Partial results [parts, cols] to the gradient.
void finish(const Floats& parts, const NormArgs& norm, void* out) {
  if (out == nullptr) return;
  const int64_t cols = norm.cols;
  const auto count = static_cast<int64_t>(parts.size()) / cols;
  Floats total(cols);
  Floats lane_sum(cols);
  for (int64_t lane = 0; lane < core::kNormLanes; ++lane) {
    std::fill(lane_sum.begin(), lane_sum.end(), 0.0F);
    for (int64_t i = lane; i < count; i += core::kNormLanes) {
      add_up(parts.data() + i * cols, cols, lane_sum.data());
    }
    if (lane == 0) {
      total = lane_sum;
    } else {
      add_up(lane_sum.data(), cols, total.data());
    }
  }
  write(out, norm.weight_dtype, 0, cols, total.data());
}

template <bool kLayer>
void backward(const core::NormBackwardArgs& args) {
  const NormArgs& norm = args.norm;
  const NormPlan plan = core::plan_norm_backward(norm);
  const core::NormParts parts = core::plan_norm_parts(plan, norm.rows, core::kNormSms);
  const Floats factor = factors(norm);
  const bool weight = args.dweight != nullptr;
  const bool bias = args.dbias != nullptr;
  Floats weight_parts(weight ? parts.parts * norm.cols : 0);
  Floats bias_parts(bias ? parts.parts * norm.cols : 0);
  at::parallel_for(0, parts.parts, 1, [&](int64_t begin, int64_t end) {
    BackwardRow<kLayer> of_row{args, factor};
    for (int64_t part = begin; part < end; ++part) {
      Floats weight_slots(weight ? parts.slots * norm.cols : 0);
      Floats bias_slots(bias ? parts.slots * norm.cols : 0);
      for (int64_t slot = 0; slot < parts.slots; ++slot) {
        for (int64_t row = part * parts.slots + slot; row < norm.rows;
             row += parts.parts * parts.slots) {
          of_row.compute(row);
          const int64_t place = slot * norm.cols;
          if (weight) add_up(of_row.hat.data(), norm.cols, weight_slots.data() + place);
          if (bias) add_up(of_row.dy.data(), norm.cols, bias_slots.data() + place);
        }
      }
      const int64_t place = part * norm.cols;
      if (weight) join_slots(weight_slots, plan, norm.cols, weight_parts.data() + place);
      if (bias) join_slots(bias_slots, plan, norm.cols, bias_parts.data() + place);
    }
  });
  finish(weight_parts, norm, args.dweight);
  finish(bias_parts, norm, args.dbias);
}

}  // namespace

void norm_forward(const core::NormForwardArgs& args) {
  args.norm.form == NormForm::kLayer ? forward<true>(args) : forward<false>(args);
}

void norm_backward(const core::NormBackwardArgs& args) {
  args.norm.form == NormForm::kLayer ? backward<true>(args) : backward<false>(args);
}

}  // namespace fp8::cpu
