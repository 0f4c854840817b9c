"""fp8.RECIPES: what each recipe stands for, written out; and one table, one grammar and one default
for everything that takes a recipe."""

import copy
import dataclasses
import inspect
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fp8
from fp8.conversion import worthwhile
from fp8.conversion._rules import MIN_WORK
from fp8.integrations.transformers import _experts as experts
from fp8.recipe import DEFAULT_GROUPED_RECIPE, OPTIONS, check_grouped_recipe, check_recipe

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FPROP, DGRAD, EVERY = ("fprop",), ("fprop", "dgrad"), ("fprop", "dgrad", "wgrad")
DENSE, BOTH = ("dense",), ("dense", "grouped")

# granularity, scaling, dtype of dy, wgrad, fast_accum, linears
EXPECTED = {
    "tensorwise": ("tensorwise", "dynamic", E5M2, "fp8", FPROP, DENSE),
    "rowwise": ("rowwise", "dynamic", E4M3, "fp8", FPROP, BOTH),
    "rowwise_gw_hp": ("rowwise", "dynamic", E4M3, "high precision", FPROP, BOTH),
    "blockwise": ("blockwise", "dynamic", E4M3, "fp8", (), BOTH),
    "delayed": ("tensorwise", "delayed", E5M2, "fp8", FPROP, DENSE),
    "rowwise_fast": ("rowwise", "dynamic", E4M3, "fp8", EVERY, BOTH),
    "rowwise_fast_gw_hp": ("rowwise", "dynamic", E4M3, "high precision", DGRAD, BOTH),
}
FIELDS = ("granularity", "scaling", "grad_output_dtype", "wgrad", "fast_accum", "linears")


def test_recipes_are_what_is_written_here():
    found = {
        name: tuple(getattr(recipe, field) for field in FIELDS)
        for name, recipe in fp8.RECIPES.items()
    }
    assert list(found.items()) == list(EXPECTED.items())
    assert {recipe.input_dtype for recipe in fp8.RECIPES.values()} == {E4M3}
    assert {recipe.weight_dtype for recipe in fp8.RECIPES.values()} == {E4M3}
    assert all(name == recipe.name for name, recipe in fp8.RECIPES.items())


def test_the_librarys_table_is_all_fields_of_a_recipe():
    rows, options, _ = torch.ops.fp8._recipes()
    fields = {field.name for field in dataclasses.fields(fp8.Recipe)}
    assert tuple(options) == OPTIONS
    assert all(row.keys() | set(OPTIONS) == fields for row in rows)


def test_grouped_recipes_are_those_of_the_table():
    expected = [name for name, row in EXPECTED.items() if "grouped" in row[-1]]
    assert tuple(expected) == fp8.GROUPED_RECIPES


def test_recipes_cannot_be_changed():
    with pytest.raises(TypeError, match="does not support item assignment"):
        fp8.RECIPES["mine"] = fp8.RECIPES["rowwise"]
    with pytest.raises(dataclasses.FrozenInstanceError, match="granularity"):
        fp8.RECIPES["rowwise"].granularity = "tensorwise"


def raised(call):
    """The message of the ValueError that `call` raises, or None."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def meta(*shape, dtype=None):
    return torch.empty(shape, device="meta", dtype=dtype)


def by_operator(recipe):
    return torch.ops.fp8.fused_linear(meta(2, 16), meta(8, 16), None, recipe)


def by_grouped_operator(recipe):
    offsets = meta(3, dtype=torch.int32)
    return torch.ops.fp8.grouped_linear(meta(2, 16), meta(3, 8, 16), offsets, None, recipe)


def by_experts_operator(recipe):
    index, weights = meta(2, 1, dtype=torch.int64), meta(2, 1)
    return torch.ops.fp8.moe_experts(
        meta(2, 16), index, weights, meta(3, 32, 16), meta(3, 16, 16), recipe=recipe
    )


@pytest.mark.parametrize("name", list(fp8.RECIPES))
def test_operator_knows_every_recipe(name):
    assert check_recipe(name) is fp8.RECIPES[name]
    for recipe in (name, *(f"{name}:{option}" for option in OPTIONS)):
        assert str(check_recipe(recipe)) == recipe
        assert by_operator(recipe).shape == (2, 8)


def test_operator_and_python_list_the_same_recipes_and_options():
    for message in (raised(lambda: by_operator("none")), raised(lambda: check_recipe("none"))):
        assert re.findall(r"'(:?\w+)'", message) == [
            *fp8.RECIPES,
            *(f":{option}" for option in OPTIONS),
            "none",
        ]


def test_operator_and_python_have_the_same_grammar():
    """Every sequence of up to three words and colons, some of them recipes; of dense linears, of
    grouped ones and of experts."""
    words = ("", ":", "rowwise", "tensorwise", *OPTIONS, *(f":{option}" for option in OPTIONS))
    words += (" ", "::", "rowwise_gw_hp:", "Rowwise", "pow2")
    texts = {"".join(parts) for parts in itertools.product(words, repeat=3)}
    accepted = {"dense": set(), "grouped": set()}
    for text in sorted(texts):
        for kind, *ways in (
            ("dense", by_operator, check_recipe),
            ("grouped", by_grouped_operator, by_experts_operator, check_grouped_recipe),
        ):
            refusals = [raised(lambda way=way, t=text: way(t)) for way in ways]
            without_prefix = {message and message.split(": ", 1)[1] for message in refusals}
            assert len(without_prefix) == 1, text
            if refusals[0] is None:
                accepted[kind].add(text)
    names = ("rowwise", "tensorwise", "rowwise_gw_hp")
    expected = {f"{name}:{option}" for name in names for option in OPTIONS}
    expected |= {"rowwise", "tensorwise"}
    assert accepted["dense"] == expected
    assert accepted["grouped"] == {text for text in expected if not text.startswith("tensorwise")}


@pytest.mark.parametrize("option", ["", *(f":{option}" for option in OPTIONS)])
@pytest.mark.parametrize("name", list(fp8.RECIPES))
def test_grouped_linears_take_what_the_table_says(name, option):
    recipe = name + option
    takes = "grouped" in fp8.RECIPES[name].linears
    for way in (by_grouped_operator, by_experts_operator, check_grouped_recipe):
        assert (raised(lambda way=way: way(recipe)) is None) == takes
    if takes:
        assert check_grouped_recipe(recipe) == check_grouped_recipe(check_recipe(recipe))
        return
    for given in (recipe, check_recipe(recipe)):
        with pytest.raises(ValueError, match=f"per row or block, as .* got '{recipe}'"):
            check_grouped_recipe(given)


def default_of(op, argument="recipe"):
    return next(a.default_value for a in op.default._schema.arguments if a.name == argument)


def test_every_entry_point_has_the_same_default():
    """Of grouped linears and experts, measured: docs/performance.md, experts."""
    assert DEFAULT_GROUPED_RECIPE == "rowwise"
    ops = torch.ops.fp8
    found = {
        "grouped_linear": default_of(ops.grouped_linear),
        "moe_experts": default_of(ops.moe_experts),
        "fp8.ops.grouped_linear": inspect.signature(fp8.ops.grouped_linear).parameters["recipe"],
        "fp8.ops.moe_experts": inspect.signature(fp8.ops.moe_experts).parameters["recipe"],
        "fp8.GroupedLinear": inspect.signature(fp8.GroupedLinear).parameters["recipe"],
        "a GroupedLinear": fp8.GroupedLinear(2, 16, 16).recipe,
        "fp8.GroupedLinear.recipe": fp8.GroupedLinear.recipe,
        "experts by transformers' switch": experts.recipe_of(nn.Module()),
    }
    defaults = {name: getattr(value, "default", value) for name, value in found.items()}
    assert defaults == dict.fromkeys(found, DEFAULT_GROUPED_RECIPE)
    header = Path(__file__).parents[3] / "csrc/include/fp8/ops.h"
    if header.exists():  # run from a clone
        text = header.read_text()
        assert f'kDefaultGroupedRecipe = "{DEFAULT_GROUPED_RECIPE}"' in text
        assert text.count("std::string_view recipe = kDefaultGroupedRecipe)") == 2


def test_every_recipe_has_a_smallest_shape():
    assert list(MIN_WORK) == list(fp8.RECIPES)


@pytest.mark.parametrize("name", ["", "Tensorwise", "row wise", None, 3])
def test_check_recipe_refuses_other_values(name):
    known = f"'rowwise_fast_gw_hp', with options out of ':power_of_two', got {name!r}"
    with pytest.raises(ValueError, match=re.escape(known)):
        check_recipe(name)
    with pytest.raises(ValueError, match=re.escape(f"':power_of_two', got {name!r}")):
        fp8.Recipe(name)


def test_recipe_has_a_string_and_back():
    recipe = fp8.Recipe("rowwise", power_of_two=True)
    assert str(recipe) == f"{recipe}" == "rowwise:power_of_two"
    assert check_recipe(str(recipe)) == check_recipe(recipe) == recipe
    assert recipe != fp8.RECIPES["rowwise"]
    assert fp8.Recipe("rowwise") == fp8.RECIPES["rowwise"]
    assert len({recipe, fp8.Recipe("rowwise", power_of_two=True), fp8.Recipe("rowwise")}) == 2
    assert repr(recipe) == "Recipe(name='rowwise', power_of_two=True)"
    for copied in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe)):
        assert copied == recipe
        assert copied.granularity == "rowwise"


def test_recipe_arguments_are_checked():
    with pytest.raises(TypeError, match=r"fp8.Recipe: expected power_of_two to be a bool, got 1"):
        fp8.Recipe("rowwise", power_of_two=1)
    with pytest.raises(TypeError, match="positional"):
        fp8.Recipe("rowwise", True)


def test_everything_that_takes_a_recipe_takes_the_object():
    recipe = fp8.Recipe("rowwise", power_of_two=True)
    x, linear = torch.randn(4, 64), nn.Linear(64, 48)
    expected = torch.ops.fp8.fused_linear(x, linear.weight, linear.bias, str(recipe))
    assert not torch.equal(
        expected, torch.ops.fp8.fused_linear(x, linear.weight, linear.bias, "rowwise")
    )
    assert torch.equal(fp8.ops.fused_linear(x, linear.weight, linear.bias, recipe), expected)
    made = fp8.Linear(64, 48, recipe=recipe)
    made.load_state_dict(linear.state_dict())
    from_linear = fp8.Linear.from_linear(linear, recipe)
    converted = fp8.convert(copy.deepcopy(linear), recipe, filter=lambda module, name: True)
    copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    for layer in (made, from_linear, converted, *copies):
        assert layer.recipe == "rowwise:power_of_two"
        assert torch.equal(layer(x), expected)
        assert "recipe=rowwise:power_of_two" in repr(layer)
    assert "float32  rowwise:power_of_two" in fp8.summary(made)
    assert "1 in FP8 (1 rowwise:power_of_two)" in fp8.summary(nn.Sequential(made))
    assert worthwhile(64, 48, recipe) == worthwhile(64, 48, "rowwise")
    assert worthwhile(4096, 4096, str(recipe)) is None
    assert "nothing to tune" not in str(fp8.autotune([(8, 16, 16)], recipe=recipe))
