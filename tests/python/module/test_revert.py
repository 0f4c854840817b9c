"""fp8.revert: nn.Linear again, with everything as it was."""

import functools
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
def test_revert_undoes_convert(model, tokens, recipe):
    expected = model(tokens)
    fresh = {name: set(vars(m)) for name, m in model.named_modules()}
    fp8.convert(model, recipe, filter=every)
    assert not torch.equal(model(tokens), expected)
    assert fp8.revert(model) is model
    assert set(kinds(model).values()) == {nn.Linear}
    assert {name: set(vars(m)) for name, m in model.named_modules()} == fresh
    assert torch.equal(model(tokens), expected)


def test_revert_takes_modules_made_as_fp8_linear():
    model = nn.Sequential(fp8.Linear(16, 16), nn.Linear(16, 16))
    fp8.revert(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert "recipe" not in repr(model)


def test_revert_of_an_unconverted_model_does_nothing(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp8.revert(model)
    assert set(kinds(model).values()) == {nn.Linear}


def test_revert_warns_about_what_it_cannot_change_back():
    model = nn.Sequential(*(fp8.Linear(16, 16) for _ in range(3)))
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    model[1].forward = functools.partial(model[1].forward)
    with pytest.warns(UserWarning, match="stays in FP8") as caught:
        fp8.revert(model)
    assert [str(w.message).split(";")[0] for w in caught] == [
        "fp8.revert: 0 stays in FP8: its class is ParametrizedLinear, a subclass",
        "fp8.revert: 1 stays in FP8: its forward was replaced on the instance",
    ]
    assert type(model[2]) is nn.Linear
    assert model(torch.randn(2, 16)).shape == (2, 16)  # those left still work
