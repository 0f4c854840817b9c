"""fp8.convert: what it changes, what it keeps, what it refuses."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fp8

RECIPES = sorted(fp8.RECIPES)


def every(module, name):
    """A filter that converts whatever the safety rules allow (by default, large shapes only)."""
    return True


def kinds(model):
    return {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_convert_changes_every_selected_linear(model, tokens, recipe):
    expected = model(tokens)
    assert fp8.convert(model, recipe, filter=every) is model
    assert set(kinds(model).values()) == {fp8.Linear}
    assert {m.recipe for m in model.modules() if isinstance(m, fp8.Linear)} == {recipe}
    error = (model(tokens) - expected).norm() / expected.norm()
    # Each of five layers adds about 4% (two operands of 3 mantissa bits); zero: nothing ran in FP8.
    assert 0.005 < error < 0.2


def test_convert_keeps_modules_parameters_and_state_dict(model):
    plain = copy.deepcopy(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fp8.convert(model, filter=every)
    assert all(new is modules[name] for name, new in model.named_modules())
    assert all(new is parameters[name] for name, new in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)


def test_convert_passes_each_module_and_name_to_the_filter_once(model):
    seen = []
    fp8.convert(model, filter=lambda module, name: seen.append((name, module)) or name == "lm_head")
    expected = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert [name for name, _ in seen] == [name for name, _ in expected]
    assert all(a is b for (_, a), (_, b) in zip(seen, expected, strict=True))
    assert [n for n, kind in kinds(model).items() if kind is fp8.Linear] == ["lm_head"]


def test_convert_takes_a_root_that_is_a_linear():
    linear = nn.Linear(64, 48)
    x = torch.randn(3, 64)
    assert fp8.convert(linear, "rowwise", filter=every) is linear
    assert type(linear) is fp8.Linear
    assert torch.equal(linear(x), fp8.ops.fused_linear(x, linear.weight, linear.bias, "rowwise"))
    assert type(fp8.revert(linear)) is nn.Linear


def test_convert_keeps_shared_modules_shared():
    model = nn.ModuleDict({"a": nn.Linear(16, 16)})
    model["b"] = model["a"]
    seen = []
    fp8.convert(model, filter=lambda module, name: not seen.append(name))
    assert seen == ["a"]
    assert model["a"] is model["b"]
    assert type(model["b"]) is fp8.Linear


def test_convert_twice_changes_nothing(model):
    fp8.convert(model, "rowwise", filter=every)
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp8.convert(model, "rowwise", filter=every)
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before


def test_convert_changes_the_recipe_of_those_selected(model):
    fp8.convert(model, filter=every)
    fp8.convert(model, "rowwise", filter=lambda module, name: name.endswith(".up"))
    recipes = {n: m.recipe for n, m in model.named_modules() if isinstance(m, fp8.Linear)}
    assert recipes == {
        "blocks.0.up": "rowwise",
        "blocks.0.down": "tensorwise",
        "blocks.1.up": "rowwise",
        "blocks.1.down": "tensorwise",
        "lm_head": "tensorwise",
    }


@pytest.mark.parametrize("function", [fp8.convert, fp8.revert, fp8.summary])
@pytest.mark.parametrize("value", [None, "model", torch.ones(2), nn.Linear])
def test_only_modules_are_taken(function, value):
    with pytest.raises(
        TypeError,
        match=rf"fp8.{function.__name__}: expected a torch.nn.Module, got {type(value).__name__}",
    ):
        function(value)


def test_convert_refuses_an_unknown_recipe_before_touching_anything(model):
    with pytest.raises(
        ValueError, match=r"expected a recipe out of 'tensorwise', 'rowwise', .*, got 'colwise'"
    ):
        fp8.convert(model, "colwise", filter=every)
    assert set(kinds(model).values()) == {nn.Linear}


def test_convert_refuses_a_filter_that_is_no_function(model):
    with pytest.raises(TypeError, match=r"filter must be a function.*got list"):
        fp8.convert(model, filter=["lm_head"])


def test_convert_with_a_filter_that_raises_touches_nothing(model):
    def broken(module, name):
        if name == "lm_head":
            raise RuntimeError("no")
        return True

    with pytest.raises(RuntimeError, match="no"):
        fp8.convert(model, filter=broken)
    assert set(kinds(model).values()) == {nn.Linear}


def test_convert_warns_when_it_converted_nothing(model):
    with pytest.warns(UserWarning, match=r"all 5 nn.Linear .* left alone.*fp8.summary") as caught:
        fp8.convert(model)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="the model has no nn.Linear"):
        fp8.convert(nn.ReLU())
