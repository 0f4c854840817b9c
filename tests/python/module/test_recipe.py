"""fp8.RECIPES: the description of what the operator does, and the same names."""

import copy
import dataclasses
import itertools
import pickle
import re

import pytest
import torch
from torch import nn

import fp8
from fp8.conversion import worthwhile
from fp8.recipe import OPTIONS, check_recipe


def test_recipes_are_the_known_five():
    assert list(fp8.RECIPES) == ["tensorwise", "rowwise", "rowwise_gw_hp", "blockwise", "delayed"]
    assert all(name == recipe.name for name, recipe in fp8.RECIPES.items())


def test_recipes_cannot_be_changed():
    with pytest.raises(TypeError, match="does not support item assignment"):
        fp8.RECIPES["mine"] = fp8.RECIPES["rowwise"]
    with pytest.raises(dataclasses.FrozenInstanceError, match="granularity"):
        fp8.RECIPES["rowwise"].granularity = "tensorwise"


def test_recipes_describe_the_training_formats():
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert fp8.RECIPES["tensorwise"].grad_output_dtype == e5m2
    assert fp8.RECIPES["rowwise"].grad_output_dtype == e4m3
    assert {recipe.input_dtype for recipe in fp8.RECIPES.values()} == {e4m3}
    assert {recipe.weight_dtype for recipe in fp8.RECIPES.values()} == {e4m3}
    assert [r.wgrad for r in fp8.RECIPES.values()] == ["fp8", "fp8", "high precision", "fp8", "fp8"]
    assert [r.fast_accum for r in fp8.RECIPES.values()] == [("fprop",)] * 3 + [(), ("fprop",)]
    assert [r.scaling for r in fp8.RECIPES.values()] == ["dynamic"] * 4 + ["delayed"]


def raised(call):
    """The message of the ValueError that `call` raises, or None."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def by_operator(recipe):
    x = torch.empty(2, 16, device="meta")
    return torch.ops.fp8.fused_linear(x, torch.empty(8, 16, device="meta"), None, recipe)


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
    """Every sequence of up to three words and colons, some of them recipes."""
    words = ("", ":", "rowwise", "tensorwise", *OPTIONS, *(f":{option}" for option in OPTIONS))
    words += (" ", "::", "rowwise_gw_hp:", "Rowwise", "pow2")
    texts = {"".join(parts) for parts in itertools.product(words, repeat=3)}
    accepted = set()
    for text in sorted(texts):
        refusals = [raised(lambda t=text: by_operator(t)), raised(lambda t=text: check_recipe(t))]
        without_prefix = [message and message.split(": ", 1)[1] for message in refusals]
        assert without_prefix[0] == without_prefix[1], text
        if refusals[0] is None:
            accepted.add(text)
    names = ("rowwise", "tensorwise", "rowwise_gw_hp")
    expected = {f"{name}:{option}" for name in names for option in OPTIONS}
    assert accepted == expected | {"rowwise", "tensorwise"}


@pytest.mark.parametrize("name", ["", "Tensorwise", "row wise", None, 3])
def test_check_recipe_refuses_other_values(name):
    known = f"'delayed', with options out of ':power_of_two', got {name!r}"
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
