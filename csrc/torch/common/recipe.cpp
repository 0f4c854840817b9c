// The grammar of recipes' strings, their numbers, and the table for Python.
#include "torch/common/recipe.h"

#include <algorithm>
#include <optional>

#include "fp8/ops.h"
#include "host/formats.h"
#include "torch/common/messages.h"

namespace fp8 {
namespace {

constexpr int kOptionShift = 8;

constexpr bool any(const Recipe& /*recipe*/) { return true; }

// 'a', 'b': the names in a table, each behind `prefix`.
template <typename Table, typename Condition>
std::string quoted_names(const Table& table, std::string_view prefix, const Condition& condition) {
  std::string text;
  for (const auto& entry : table) {
    if (!condition(entry)) continue;
    if (!text.empty()) text.append(", ");
    text.append("'").append(prefix).append(entry.name).append("'");
  }
  return text;
}

std::string quoted_options() {
  return quoted_names(kRecipeOptions, ":", [](const RecipeOption&) { return true; });
}

template <typename Table>
std::optional<int64_t> index_in(const Table& table, std::string_view name) {
  for (size_t i = 0; i < table.size(); ++i) {
    if (table[i].name == name) return static_cast<int64_t>(i);
  }
  return std::nullopt;
}

// Nothing for a string that names no recipe.
std::optional<int64_t> parse(std::string_view rest) {
  const auto next = [&rest] {
    const size_t end = std::min(rest.find(':'), rest.size());
    const std::string_view word = rest.substr(0, end);
    rest.remove_prefix(end);
    return word;
  };
  std::optional<int64_t> id = index_in(kRecipes, next());
  while (id && !rest.empty()) {
    rest.remove_prefix(1);
    const std::optional<int64_t> option = index_in(kRecipeOptions, next());
    const int64_t bit = option ? int64_t{1} << (kOptionShift + *option) : 0;
    if (bit == 0 || (*id & bit) != 0) return std::nullopt;
    *id |= bit;
  }
  return id;
}

constexpr bool grouped_linears_take(std::string_view name) {
  return std::any_of(kRecipes.begin(), kRecipes.end(), [name](const Recipe& recipe) {
    return recipe.name == name && suits_grouped(recipe);
  });
}
static_assert(grouped_linears_take(kDefaultGroupedRecipe));

// --- Python's words ---

std::string granularity_of(const Recipe& recipe) {
  if (recipe.granularity == core::Granularity::kTensorwise) return "tensorwise";
  return recipe.granularity == core::Granularity::kRowwise ? "rowwise" : "blockwise";
}

std::string fast_products_of(const Recipe& recipe) {
  std::string products;
  if (recipe.fast_fprop) products += "fprop ";
  if (recipe.fast_dgrad) products += "dgrad ";
  if (recipe.fast_wgrad) products += "wgrad ";
  return products;
}

}  // namespace

int64_t recipe_id(std::string_view text) {
  const std::optional<int64_t> id = parse(text);
  FP8_CHECK_VALUE(id.has_value(), "fp8::fused_linear: expected a recipe out of ",
                  quoted_names(kRecipes, "", any), ", with options out of ", quoted_options(),
                  ", got '", text, "'");
  return *id;
}

int64_t grouped_recipe_id(std::string_view op, std::string_view text) {
  const std::optional<int64_t> id = parse(text);
  FP8_CHECK_VALUE(id && suits_grouped(recipe_at(*id)), "fp8::", op,
                  ": expected a recipe with scales per row or block, as the grouped products "
                  "take: ",
                  quoted_names(kRecipes, "", suits_grouped), ", with options out of ",
                  quoted_options(), ", got '", text, "'");
  return *id;
}

Recipe recipe_at(int64_t id) {
  constexpr int64_t kEnd = int64_t{1} << (kOptionShift + kRecipeOptions.size());
  const int64_t index = id & ((1 << kOptionShift) - 1);
  FP8_CHECK_VALUE(id >= 0 && id < kEnd && index < static_cast<int64_t>(kRecipes.size()),
                  "fp8: expected the number of a recipe, below ", kRecipes.size(),
                  " plus bits for its options, got ", id);
  Recipe recipe = kRecipes[static_cast<size_t>(index)];
  for (size_t i = 0; i < kRecipeOptions.size(); ++i) {
    recipe.*kRecipeOptions[i].field = ((id >> kOptionShift >> i) & 1) != 0;
  }
  return recipe;
}

Recipe grouped_recipe_at(int64_t id) {
  Recipe recipe = recipe_at(id);
  FP8_CHECK_VALUE(suits_grouped(recipe),
                  "fp8: expected the number of a recipe that grouped products take, got ", id,
                  " ('", recipe.name, "')");
  if (is_blockwise(recipe.granularity)) recipe.fp8_wgrad = false;
  return recipe;
}

std::tuple<c10::List<c10::Dict<std::string, std::string>>, c10::List<std::string>, std::string>
recipe_table() {
  c10::List<c10::Dict<std::string, std::string>> recipes;
  for (const Recipe& recipe : kRecipes) {
    c10::Dict<std::string, std::string> fields;
    fields.insert("name", std::string(recipe.name));
    fields.insert("granularity", granularity_of(recipe));
    fields.insert("scaling", recipe.delayed ? "delayed" : "dynamic");
    fields.insert("input_dtype", to_text(recipe.forward_dtype));
    fields.insert("weight_dtype", to_text(recipe.forward_dtype));
    fields.insert("grad_output_dtype", to_text(recipe.grad_dtype));
    fields.insert("wgrad", recipe.fp8_wgrad ? "fp8" : "high precision");
    fields.insert("fast_accum", fast_products_of(recipe));
    fields.insert("linears", suits_grouped(recipe) ? "dense grouped" : "dense");
    recipes.push_back(std::move(fields));
  }
  c10::List<std::string> options;
  for (const RecipeOption& option : kRecipeOptions) options.push_back(std::string(option.name));
  return {recipes, options, std::string(kDefaultGroupedRecipe)};
}

}  // namespace fp8
