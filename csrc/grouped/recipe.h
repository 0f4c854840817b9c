// The recipes of grouped matmuls. Operands are e4m3 with a scale per row of each operand as the
// matmul reads it, which is what the grouped kernels of ATen take.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "common/messages.h"

namespace fp8 {

// The one place that says how each product accumulates (fprop is always fast). The numerics
// contract has dgrad and wgrad split, as dense layers do. The grouped kernel pays more for that
// than cuBLASLt does, 1.2 to 2.6 times the time where groups have a few hundred rows, so recipes
// that accumulate fast stand beside those that keep the contract.
struct GroupedRecipe {
  std::string_view name;
  bool fp8_wgrad;  // false: dW = dy^T x in bf16 from unquantized operands
  bool fast_dgrad;
  bool fast_wgrad;
};

inline constexpr std::array<GroupedRecipe, 4> kGroupedRecipes{{
    {"rowwise", true, false, false},
    {"rowwise_gw_hp", false, false, false},
    {"rowwise_fast", true, true, true},
    {"rowwise_fast_gw_hp", false, true, false},
}};

inline int64_t grouped_recipe_index(std::string_view op, std::string_view name) {
  for (size_t i = 0; i < kGroupedRecipes.size(); ++i) {
    if (kGroupedRecipes[i].name == name) return static_cast<int64_t>(i);
  }
  std::string known;
  for (const GroupedRecipe& recipe : kGroupedRecipes) {
    known += (known.empty() ? "'" : ", '") + std::string(recipe.name) + "'";
  }
  FP8_CHECK_VALUE(false, "fp8::", op, ": expected a recipe out of ", known, ", got '", name, "'");
}

inline const GroupedRecipe& grouped_recipe_at(int64_t index) {
  FP8_CHECK_VALUE(index >= 0 && index < static_cast<int64_t>(kGroupedRecipes.size()),
                  "fp8: expected a grouped recipe index below ", kGroupedRecipes.size(), ", got ",
                  index);
  return kGroupedRecipes[static_cast<size_t>(index)];
}

}  // namespace fp8
