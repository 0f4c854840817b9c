// Rotary position embedding on the CPU, row by row.
#include "cpu/rope.h"

#include <ATen/Parallel.h>

#include <vector>

#include "cpu/grouped_rows.h"
#include "host/rope.h"

namespace fp8::cpu {
namespace {

using core::RopeArgs;
using core::RopeLayout;
using core::RopeTensor;
using Floats = std::vector<float>;

// Columns of pair i of `half`.
struct PairColumns {
  bool interleaved;
  int64_t half;

  int64_t first(int64_t i) const { return interleaved ? 2 * i : i; }
  int64_t second(int64_t i) const { return interleaved ? 2 * i + 1 : half + i; }
};

// Where row [i0, i1, i2] begins.
int64_t offset_of(const int64_t* strides, const int64_t* sizes, int64_t row) {
  const int64_t outer = row / sizes[2];
  return outer / sizes[1] * strides[0] + outer % sizes[1] * strides[1] +
         row % sizes[2] * strides[2];
}

void rotate(const RopeArgs& args, const Floats& cos, const Floats& sin, const Floats& x,
            Floats& y) {
  const int64_t half = args.rotary / 2;
  const bool pairs = args.layout != RopeLayout::kHalves;
  const bool pairs_behind = args.layout == RopeLayout::kInterleaved;
  const PairColumns from{.interleaved = args.transposed ? pairs_behind : pairs, .half = half};
  const PairColumns to{.interleaved = args.transposed ? pairs : pairs_behind, .half = half};
  const PairColumns of_cos{.interleaved = pairs, .half = half};
  const bool adds_zero = args.transposed && !args.keeps_minus_zero;
  const auto product = [&](float a, float b) {
    const float made = mul(a, b);
    return args.rounds_products ? rounded(made, args.y_dtype) : made;
  };
  for (int64_t i = 0; i < half; ++i) {
    const int64_t cos_a = args.per_pair ? i : of_cos.first(i);
    const int64_t cos_b = args.per_pair ? i : of_cos.second(i);
    const RopeFactors factors = rope_factors(sin[cos_a], sin[cos_b], args.transposed);
    const float a = x[from.first(i)];
    const float b = x[from.second(i)];
    y[to.first(i)] = add(product(a, cos[cos_a]), product(b, factors.by_b));
    y[to.second(i)] = add(product(b, cos[cos_b]), product(a, factors.by_a));
  }
  std::copy(x.begin() + args.rotary, x.end(), y.begin() + args.rotary);
  if (!adds_zero) return;
  const bool rounds = rope_rounds_before_zero(args.rotary, args.cols);
  for (float& value : y) value = add(rounds ? rounded(value, args.y_dtype) : value, 0.0F);
}

void rope_tensor(const RopeArgs& args, const RopeTensor& tensor) {
  const int64_t rows = tensor.sizes[0] * tensor.sizes[1] * tensor.sizes[2];
  const int64_t cos_cols = args.per_pair ? args.rotary / 2 : args.rotary;
  at::parallel_for(0, rows, grain(args.cols), [&](int64_t begin, int64_t end) {
    Floats x(args.cols);
    Floats y(args.cols);
    Floats cos(cos_cols);
    Floats sin(cos_cols);
    for (int64_t row = begin; row < end; ++row) {
      const auto offset = [&](const int64_t* strides) {
        return offset_of(strides, tensor.sizes, row);
      };
      read(tensor.x, args.x_dtype, offset(tensor.x_strides), args.cols, x.data());
      read(args.cos, args.cos_dtype, offset(tensor.cos_strides), cos_cols, cos.data());
      read(args.sin, args.cos_dtype, offset(tensor.sin_strides), cos_cols, sin.data());
      rotate(args, cos, sin, x, y);
      write(tensor.y, args.y_dtype, offset(tensor.y_strides), args.cols, y.data());
    }
  });
}

}  // namespace

void rope(const RopeArgs& args) {
  for (const RopeTensor& tensor : args.tensors) {
    if (tensor.x != nullptr) rope_tensor(args, tensor);
  }
}

}  // namespace fp8::cpu
