// The recipes: which formats and scaling groups each of the three matmuls of a linear layer uses,
// dense or grouped, and how it accumulates. One table, from which C++, Python (fp8.RECIPES, by way
// of the operator _recipes), the pages and the tests' parameters follow.
//
// A recipe is named by a string: a name, then options, each after a colon, at most once:
// "rowwise", "rowwise:power_of_two".
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>

#include "fp8/core.h"

namespace fp8 {

// fprop y = x W^T, dgrad dx = dy W, wgrad dW = dy^T x. Fast accumulation is that of Hopper's tensor
// cores; without it sums are promoted to fp32 on the way, which costs grouped products 1.1 to 1.25
// times the time on Hopper (docs/measurements.md).
struct Recipe {
  std::string_view name;
  core::Granularity granularity;                      // x and dy
  core::Granularity weight_granularity;               // of one family with it
  at::ScalarType forward_dtype = at::kFloat8_e4m3fn;  // x and weight
  at::ScalarType grad_dtype = at::kFloat8_e4m3fn;     // dy
  bool fast_fprop = true;
  bool fast_dgrad = false;
  bool fast_wgrad = false;
  bool fp8_wgrad = true;      // false: dW in x's own precision, for which x itself is saved
  bool delayed = false;       // scales from the amaxes of earlier calls, where there is a history
  bool power_of_two = false;  // an option of each: computed scales are powers of two
};

inline constexpr std::array<Recipe, 7> kRecipes{{
    // The fastest with dynamic scales. dy has the wider range of e5m2, since one scale serves the
    // whole tensor.
    {.name = "tensorwise",
     .granularity = core::Granularity::kTensorwise,
     .weight_granularity = core::Granularity::kTensorwise,
     .grad_dtype = at::kFloat8_e5m2},
    // A scale per row isolates outliers, so e4m3 is enough for dy too.
    {.name = "rowwise",
     .granularity = core::Granularity::kRowwise,
     .weight_granularity = core::Granularity::kRowwise},
    // As rowwise, with the weight gradient (the product most sensitive to rounding) left
    // unquantized.
    {.name = "rowwise_gw_hp",
     .granularity = core::Granularity::kRowwise,
     .weight_granularity = core::Granularity::kRowwise,
     .fp8_wgrad = false},
    // DeepSeek-V3's: an outlier costs its block of 128 elements precision, not its row.
    {.name = "blockwise",
     .granularity = core::Granularity::kBlock1x128,
     .weight_granularity = core::Granularity::kBlock128x128,
     .fast_fprop = false},
    // tensorwise in one pass over each tensor, as a rule.
    {.name = "delayed",
     .granularity = core::Granularity::kTensorwise,
     .weight_granularity = core::Granularity::kTensorwise,
     .grad_dtype = at::kFloat8_e5m2,
     .delayed = true},
    // rowwise with gradients that accumulate fast, which is for small groups.
    {.name = "rowwise_fast",
     .granularity = core::Granularity::kRowwise,
     .weight_granularity = core::Granularity::kRowwise,
     .fast_dgrad = true,
     .fast_wgrad = true},
    {.name = "rowwise_fast_gw_hp",
     .granularity = core::Granularity::kRowwise,
     .weight_granularity = core::Granularity::kRowwise,
     .fast_dgrad = true,
     .fp8_wgrad = false},
}};

struct RecipeOption {
  std::string_view name;
  bool Recipe::*field;
};
inline constexpr std::array<RecipeOption, 1> kRecipeOptions{{
    {"power_of_two", &Recipe::power_of_two},
}};

// Dense linears take every recipe. Grouped ones take what their products do: e4m3, with a scale per
// row of each operand as the product reads it or in blocks. Recipes of one scale per tensor have dy
// in e5m2, and would gain nothing: a scale per row takes one pass where that takes two.
constexpr bool suits_grouped(const Recipe& recipe) {
  return recipe.granularity != core::Granularity::kTensorwise &&
         recipe.forward_dtype == at::kFloat8_e4m3fn && recipe.grad_dtype == at::kFloat8_e4m3fn &&
         !recipe.delayed;
}

// A recipe as private ops carry it: the index into kRecipes in the low byte, above it a bit for
// each option. The string is read once, at the public op; what names no recipe, or one that the op
// does not take, is refused in the op's name.
int64_t recipe_id(std::string_view text);  // of fused_linear
int64_t grouped_recipe_id(std::string_view op, std::string_view text);

Recipe recipe_at(int64_t id);
// As grouped linears run it: with blocks, dW is in high precision. Along the rows of a group, which
// is what it contracts, grouped products take no blocks.
Recipe grouped_recipe_at(int64_t id);

// The operator _recipes: the table, a field's name and its value in Python's words; the names of
// the options; the recipe of grouped linears where none is asked for.
std::tuple<c10::List<c10::Dict<std::string, std::string>>, c10::List<std::string>, std::string>
recipe_table();

}  // namespace fp8
