// The training recipes: which formats and scaling groups each of the three matmuls of a linear
// layer uses. And the strings that name them: a name, then options, each after a colon, at most
// once: "rowwise", "rowwise:power_of_two". python/fp8/recipe.py has the same grammar.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
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
  bool fp8_wgrad;        // false: dW = dy^T x in x's own precision, for which x itself is saved
  bool delayed = false;  // scales from the amaxes of earlier calls, where there is a history
  bool power_of_two = false;  // an option of each: computed scales are powers of two
};

inline constexpr std::array<Recipe, 5> kRecipes{{
    {"tensorwise", core::Granularity::kTensorwise, core::Granularity::kTensorwise,
     at::kFloat8_e4m3fn, at::kFloat8_e5m2, true},
    {"rowwise", core::Granularity::kRowwise, core::Granularity::kRowwise, at::kFloat8_e4m3fn,
     at::kFloat8_e4m3fn, true},
    {"rowwise_gw_hp", core::Granularity::kRowwise, core::Granularity::kRowwise, at::kFloat8_e4m3fn,
     at::kFloat8_e4m3fn, false},
    {"blockwise", core::Granularity::kBlock1x128, core::Granularity::kBlock128x128,
     at::kFloat8_e4m3fn, at::kFloat8_e4m3fn, true},
    {"delayed", core::Granularity::kTensorwise, core::Granularity::kTensorwise, at::kFloat8_e4m3fn,
     at::kFloat8_e5m2, true, true},
}};

struct RecipeOption {
  std::string_view name;
  bool Recipe::*field;
};
inline constexpr std::array<RecipeOption, 1> kRecipeOptions{{
    {"power_of_two", &Recipe::power_of_two},
}};

// A recipe as private ops carry it: the index into kRecipes in the low byte, above it a bit for
// each option. The string is read once, at the public op.
inline constexpr int kRecipeOptionShift = 8;

// 'a', 'b': the names in a table, each behind `prefix`.
template <typename Table>
std::string quoted_names(const Table& table, std::string_view prefix) {
  std::string text;
  for (const auto& entry : table) {
    if (!text.empty()) text.append(", ");
    text.append("'").append(prefix).append(entry.name).append("'");
  }
  return text;
}

[[noreturn]] inline void refuse_recipe(std::string_view text) {
  FP8_CHECK_VALUE(false, "fp8::fused_linear: expected a recipe out of ", quoted_names(kRecipes, ""),
                  ", with options out of ", quoted_names(kRecipeOptions, ":"), ", got '", text,
                  "'");
}

inline int64_t recipe_id(std::string_view text) {
  std::string_view rest = text;
  const auto next = [&rest] {
    const size_t end = std::min(rest.find(':'), rest.size());
    const std::string_view word = rest.substr(0, end);
    rest.remove_prefix(end);
    return word;
  };
  const auto index_in = [text](const auto& table, std::string_view word) {
    for (size_t i = 0; i < table.size(); ++i) {
      if (table[i].name == word) return static_cast<int64_t>(i);
    }
    refuse_recipe(text);
  };
  int64_t id = index_in(kRecipes, next());
  while (!rest.empty()) {
    rest.remove_prefix(1);
    const int64_t bit = int64_t{1} << (kRecipeOptionShift + index_in(kRecipeOptions, next()));
    if ((id & bit) != 0) refuse_recipe(text);
    id |= bit;
  }
  return id;
}

inline Recipe recipe_at(int64_t id) {
  constexpr int64_t kEnd = int64_t{1} << (kRecipeOptionShift + kRecipeOptions.size());
  const int64_t index = id & ((1 << kRecipeOptionShift) - 1);
  FP8_CHECK_VALUE(id >= 0 && id < kEnd && index < static_cast<int64_t>(kRecipes.size()),
                  "fp8: expected the number of a recipe, below ", kRecipes.size(),
                  " plus bits for its options, got ", id);
  Recipe recipe = kRecipes[static_cast<size_t>(index)];
  for (size_t i = 0; i < kRecipeOptions.size(); ++i) {
    recipe.*kRecipeOptions[i].field = ((id >> kRecipeOptionShift >> i) & 1) != 0;
  }
  return recipe;
}

}  // namespace fp8
