// The training recipes: which formats and scaling groups each of the three matmuls of a linear
// layer uses.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "common/messages.h"
#include "fp8/core.h"

namespace fp8 {

struct Recipe {
  std::string_view name;
  core::Granularity granularity;         // x and dy
  core::Granularity weight_granularity;  // of one family with it
  at::ScalarType forward_dtype;          // x and weight
  at::ScalarType grad_dtype;             // dy
  bool fp8_wgrad;  // false: dW = dy^T x in x's own precision, for which x itself is saved
};

// The index is what private ops carry: a recipe's name is read once, at the public op.
inline constexpr std::array<Recipe, 4> kRecipes{{
    {"tensorwise", core::Granularity::kTensorwise, core::Granularity::kTensorwise,
     at::kFloat8_e4m3fn, at::kFloat8_e5m2, true},
    {"rowwise", core::Granularity::kRowwise, core::Granularity::kRowwise, at::kFloat8_e4m3fn,
     at::kFloat8_e4m3fn, true},
    {"rowwise_gw_hp", core::Granularity::kRowwise, core::Granularity::kRowwise, at::kFloat8_e4m3fn,
     at::kFloat8_e4m3fn, false},
    {"blockwise", core::Granularity::kBlock1x128, core::Granularity::kBlock128x128,
     at::kFloat8_e4m3fn, at::kFloat8_e4m3fn, true},
}};

inline int64_t recipe_index(std::string_view name) {
  for (size_t i = 0; i < kRecipes.size(); ++i) {
    if (kRecipes[i].name == name) return static_cast<int64_t>(i);
  }
  std::string known;
  for (const Recipe& recipe : kRecipes) {
    known += (known.empty() ? "'" : ", '") + std::string(recipe.name) + "'";
  }
  FP8_CHECK_VALUE(false, "fp8::fused_linear: expected a recipe out of ", known, ", got '", name,
                  "'");
}

inline const Recipe& recipe_at(int64_t index) {
  FP8_CHECK_VALUE(index >= 0 && index < static_cast<int64_t>(kRecipes.size()),
                  "fp8: expected a recipe index below ", kRecipes.size(), ", got ", index);
  return kRecipes[static_cast<size_t>(index)];
}

}  // namespace fp8
