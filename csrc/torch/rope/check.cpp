// What rotary position embedding refuses, for every device and for fake tensors alike, and how it
// reads options.
#include <ATen/ATen.h>

#include <array>
#include <utility>

#include "torch/common/tensors.h"
#include "torch/rope/rope_ops.h"

namespace fp8 {
namespace {

using core::RopeLayout;

constexpr std::array<std::pair<std::string_view, RopeLayout>, 3> kLayouts{
    {{"halves", RopeLayout::kHalves},
     {"interleaved", RopeLayout::kInterleaved},
     {"interleaved_to_halves", RopeLayout::kInterleavedToHalves}}};
constexpr std::array<std::pair<std::string_view, RopeRounding>, 3> kRoundings{
    {{"each", RopeRounding::kEach}, {"sum", RopeRounding::kSum}, {"once", RopeRounding::kOnce}}};
constexpr int64_t kMaxDims = 4;

template <typename Table>
auto named(const char* op, const char* what, const Table& table, std::string_view name) {
  for (const auto& [text, value] : table) {
    if (text == name) return value;
  }
  FP8_CHECK_VALUE(false, "fp8::", op, ": expected ", what, " '", table[0].first, "', '",
                  table[1].first, "' or '", table[2].first, "', got '", name, "'");
}

bool broadcasts(const at::Tensor& from, const at::Tensor& to, const c10::SymInt& cols) {
  if (from.dim() < 1 || from.dim() > to.dim() || from.sym_size(-1) != cols) return false;
  for (int64_t i = 2; i <= from.dim(); ++i) {
    if (from.sym_size(-i) != to.sym_size(-i) && from.sym_size(-i) != 1) return false;
  }
  return true;
}

void check_rotated(const char* op, const char* name, const at::Tensor& x, const at::Tensor& cos,
                   const at::Tensor& sin, const c10::SymInt& rotary) {
  FP8_CHECK_HIGH_PRECISION(op, name, x);
  FP8_CHECK_VALUE(x.dim() >= 1 && x.dim() <= kMaxDims, "fp8::", op, ": expected ", name,
                  " of 1 to ", kMaxDims, " dimensions, got ", x.sym_sizes());
  FP8_CHECK_VALUE(rotary >= 0 && rotary % 2 == 0 && rotary <= x.sym_size(-1), "fp8::", op,
                  ": expected an even rotary_dim of at most ", x.sym_size(-1), ", the columns of ",
                  name, ", got ", rotary);
  const auto check_angles = [&](const char* angles_name, const at::Tensor& angles) {
    FP8_CHECK_TYPE(angles.scalar_type() == x.scalar_type() || angles.scalar_type() == at::kFloat,
                   "fp8::", op, ": expected ", angles_name, " in ", name, "'s dtype ",
                   x.scalar_type(), " or in float32, got ", angles.scalar_type());
    FP8_CHECK_SAME_DEVICE(op, angles_name, angles, name, x);
    FP8_CHECK_VALUE(broadcasts(angles, x, rotary) || broadcasts(angles, x, rotary / 2), "fp8::", op,
                    ": expected ", angles_name, " to broadcast to ", name, " ", x.sym_sizes(),
                    ", with rotary_dim = ", rotary, " or half as many columns, got ",
                    angles.sym_sizes());
  };
  check_angles("cos", cos);
  check_angles("sin", sin);
}

}  // namespace

RopeForm rope_form(const char* op, int64_t packed) {
  const auto layout = packed & 3;
  const auto rounding = packed >> 2 & 3;
  FP8_CHECK_VALUE(packed >> 6 == 0 && layout < 3 && rounding < 3, "fp8::", op,
                  ": expected the number of a form, got ", packed);
  return {.layout = static_cast<RopeLayout>(layout),
          .rounding = static_cast<RopeRounding>(rounding),
          .transposed = (packed & 16) != 0,
          .keeps_minus_zero = (packed & 32) != 0};
}

RopeForm rope_form(const char* op, std::string_view layout, std::string_view rounding) {
  return {.layout = named(op, "layout", kLayouts, layout),
          .rounding = named(op, "rounding", kRoundings, rounding)};
}

void check_rope(const char* op, const OptionalTensor& q, const OptionalTensor& k,
                const at::Tensor& cos, const at::Tensor& sin, const c10::SymInt& rotary) {
  FP8_CHECK_VALUE(q || k, "fp8::", op, ": expected q or k, got neither");
  FP8_CHECK_TYPE(cos.scalar_type() == sin.scalar_type(), "fp8::", op,
                 ": expected cos and sin of one dtype, got ", cos.scalar_type(), " and ",
                 sin.scalar_type());
  FP8_CHECK_VALUE(cos.dim() > 0 && sin.dim() > 0 && cos.sym_size(-1) == sin.sym_size(-1),
                  "fp8::", op, ": expected cos and sin of as many columns, got ", cos.sym_sizes(),
                  " and ", sin.sym_sizes());
  if (q) check_rotated(op, "q", *q, cos, sin, rotary);
  if (q && k) {
    FP8_CHECK_TYPE(q->scalar_type() == k->scalar_type(), "fp8::", op, ": expected k in q's dtype ",
                   q->scalar_type(), ", got ", k->scalar_type());
    FP8_CHECK_VALUE(k->dim() > 0 && q->sym_size(-1) == k->sym_size(-1), "fp8::", op,
                    ": expected k of q's columns, ", q->sym_size(-1), ", got ", k->sym_sizes());
    FP8_CHECK_SAME_DEVICE(op, "k", *k, "q", *q);
  }
  if (k) check_rotated(op, "k", *k, cos, sin, rotary);
}

}  // namespace fp8
