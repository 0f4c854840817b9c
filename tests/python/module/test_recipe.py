"""fp8.RECIPES: the description of what the operator does, and the same names."""

import dataclasses
import re

import pytest
import torch

import fp8
from fp8.recipe import check_recipe


def test_recipes_are_the_known_four():
    assert list(fp8.RECIPES) == ["tensorwise", "rowwise", "rowwise_gw_hp", "blockwise"]
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
    assert [r.wgrad for r in fp8.RECIPES.values()] == ["fp8", "fp8", "high precision", "fp8"]
    assert [r.fast_accum for r in fp8.RECIPES.values()] == [("fprop",)] * 3 + [()]


@pytest.mark.parametrize("name", list(fp8.RECIPES))
def test_operator_knows_every_recipe(name):
    assert check_recipe(name) is fp8.RECIPES[name]
    assert fp8.ops.fused_linear(torch.randn(2, 16), torch.randn(8, 16), None, name).shape == (2, 8)


def test_operator_and_python_list_the_same_recipes():
    with pytest.raises(ValueError, match=r"fp8::fused_linear: expected a recipe") as by_operator:
        fp8.ops.fused_linear(torch.randn(2, 16), torch.randn(8, 16), None, "colwise")
    with pytest.raises(ValueError, match=r"fp8: expected a recipe") as by_python:
        check_recipe("colwise")
    for raised in (by_operator, by_python):
        assert re.findall(r"'(\w+)'", str(raised.value)) == [*fp8.RECIPES, "colwise"]


@pytest.mark.parametrize("name", ["", "Tensorwise", "row wise", None, 3])
def test_check_recipe_refuses_other_values(name):
    with pytest.raises(ValueError, match=re.escape(f"'blockwise', got {name!r}")):
        check_recipe(name)
