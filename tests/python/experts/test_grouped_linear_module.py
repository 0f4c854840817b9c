"""fp8.GroupedLinear: nn.Linear's parameters, many times; forward is the operator."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fp8

OFFSETS = torch.tensor([5, 5, 20], dtype=torch.int32)


def test_grouped_linear_module_starts_as_linears_do():
    torch.manual_seed(11)
    ours = fp8.GroupedLinear(3, 32, 48)
    torch.manual_seed(11)
    linears = [nn.Linear(32, 48) for _ in range(3)]
    assert torch.equal(ours.weight, torch.stack([linear.weight for linear in linears]))
    assert torch.equal(ours.bias, torch.stack([linear.bias for linear in linears]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", fp8.GROUPED_RECIPES)
def test_grouped_linear_module_calls_the_operator(recipe, bias):
    layer = fp8.GroupedLinear(3, 32, 48, bias, recipe=recipe)
    x = torch.randn(23, 32)
    y = layer(x, OFFSETS)
    expected = torch.ops.fp8.grouped_linear(x, layer.weight, OFFSETS, layer.bias, recipe)
    assert torch.equal(y, expected)
    assert float(y[20:].abs().max()) == 0
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert float(layer.weight.grad[1].abs().max()) == 0  # a group without rows


@pytest.mark.parametrize("recipe", ["tensorwise", "", None])
def test_grouped_linear_module_refuses_other_recipes(recipe):
    with pytest.raises(ValueError, match=r"per row or block, .* take: 'rowwise', .* got"):
        fp8.GroupedLinear(2, 16, 16, recipe=recipe)


def test_grouped_linear_module_takes_the_object():
    recipe = fp8.Recipe("rowwise_fast", power_of_two=True)
    layer = fp8.GroupedLinear(3, 32, 48, recipe=recipe)
    assert layer.recipe == "rowwise_fast:power_of_two"
    x = torch.randn(20, 32)
    args = (x, layer.weight, OFFSETS, layer.bias)
    assert torch.equal(layer(x, OFFSETS), fp8.ops.grouped_linear(*args, recipe))
    assert torch.equal(layer(x, OFFSETS), torch.ops.fp8.grouped_linear(*args, str(recipe)))
    assert not torch.equal(layer(x, OFFSETS), fp8.ops.grouped_linear(*args, "rowwise_fast"))


def test_grouped_linear_module_state():
    layer = fp8.GroupedLinear(2, 16, 24, dtype=torch.bfloat16, recipe="rowwise_gw_hp")
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.weight.shape == (2, 24, 16)
    assert layer.bias.shape == (2, 24)
    assert repr(layer) == (
        "GroupedLinear(num_groups=2, in_features=16, out_features=24, bias=True, "
        "recipe=rowwise_gw_hp)"
    )
    assert list(fp8.GroupedLinear(2, 16, 24, bias=False).state_dict()) == ["weight"]
    assert fp8.GroupedLinear(2, 16, 24, device="meta").weight.is_meta
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        assert torch.equal(other.weight, layer.weight)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 16, 16), (2, 0, 16), (2, 16, 0)])
def test_grouped_linear_module_of_nothing(shape):
    groups, k, n = shape
    layer = fp8.GroupedLinear(groups, k, n)
    y = layer(torch.randn(4, k), torch.full((groups,), 4, dtype=torch.int32))
    assert y.shape == (4, n)


def test_grouped_linear_module_caches_weights():
    layer = fp8.GroupedLinear(3, 32, 48)
    x = torch.randn(20, 32)
    alias = layer.weight.data
    with torch.no_grad(), fp8.cached_weights(layer):
        first = layer(x, OFFSETS)
        alias.mul_(2.0)  # not counted
        assert torch.equal(layer(x, OFFSETS), first)
    with torch.no_grad():
        assert not torch.equal(layer(x, OFFSETS), first)


def test_grouped_linear_module_is_left_alone_by_convert():
    model = nn.Sequential(fp8.GroupedLinear(2, 16, 16), nn.Linear(16, 16))
    fp8.convert(model, filter=lambda module, name: True)
    assert type(model[0]) is fp8.GroupedLinear
    assert "1 linear: 1 in FP8" in fp8.summary(model)
