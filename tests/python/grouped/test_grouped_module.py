"""fp8.GroupedLinear, and cached weights of groups."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_bits

import fp8

OPS = torch.ops.fp8


def test_grouped_module_is_the_operator(device):
    torch.manual_seed(4)
    layer = fp8.GroupedLinear(3, 64, 32, device=device, dtype=torch.bfloat16, recipe="rowwise_fast")
    x = torch.randn(20, 64, device=device, dtype=torch.bfloat16)
    offsets = torch.tensor([4, 4, 19], device=device, dtype=torch.int32)
    y = layer(x, offsets)
    assert_same_bits(y, OPS.grouped_linear(x, layer.weight, offsets, layer.bias, "rowwise_fast"))
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.weight.abs().max() <= 1 / 8
    assert "num_groups=3, in_features=64, out_features=32, bias=True" in repr(layer)
    assert fp8.GroupedLinear(3, 64, 32, bias=False).bias is None


@pytest.mark.parametrize(
    "recipe", ["rowwise", "rowwise_gw_hp", "rowwise:power_of_two", "blockwise"]
)
def test_cached_weights_of_groups(device, recipe):
    """The same bits; an update that counts is noticed, one that does not is not: it is cached."""
    layer = fp8.GroupedLinear(3, 64, 32, device=device, recipe=recipe, dtype=torch.bfloat16)
    x = torch.randn(20, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.tensor([4, 4, 19], device=device, dtype=torch.int32)

    def step():
        y = layer(x, offsets)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, layer.weight])]

    expected = step()
    alias = layer.weight.data
    with fp8.cached_weights(layer):
        for _ in range(2):
            for ours, theirs in zip(step(), expected, strict=True):
                assert_same_bits(ours, theirs)
        kept = layer.weight.detach().clone()
        alias.copy_(torch.randn_like(kept))  # counts no version
        assert_same_bits(step()[0], expected[0])
        with torch.no_grad():
            layer.weight.mul_(2)
        assert not torch.equal(step()[0], expected[0])
    layer.weight.data.copy_(kept)
    assert_same_bits(step()[0], expected[0])


def test_cached_weights_of_groups_with_other_scales(device):
    """What was made for one recipe is not taken for another."""
    layer = fp8.GroupedLinear(3, 64, 32, device=device, dtype=torch.bfloat16, recipe="rowwise")
    x = torch.randn(20, 64, device=device, dtype=torch.bfloat16)
    offsets = torch.tensor([4, 4, 19], device=device, dtype=torch.int32)
    recipes = ("rowwise", "rowwise:power_of_two", "blockwise", "rowwise")

    def run():
        for recipe in recipes:
            layer.recipe = recipe
            yield layer(x, offsets).detach()

    expected = list(run())
    assert not torch.equal(expected[0], expected[1])
    with fp8.cached_weights(layer):
        for ours, theirs in zip(run(), expected, strict=True):
            assert_same_bits(ours, theirs)


def test_cached_weights_of_weights_stored_transposed(device):
    """Seen through a view that is new in every call."""
    layer = torch.nn.Module()
    holder = fp8.GroupedLinear(3, 32, 64, bias=False, device=device, dtype=torch.bfloat16)
    layer.inner = holder
    x = torch.randn(20, 64, device=device, dtype=torch.bfloat16)
    offsets = torch.tensor([4, 4, 20], device=device, dtype=torch.int32)
    expected = OPS.grouped_linear(x, holder.weight.transpose(1, 2), offsets)
    alias = holder.weight.data
    with fp8.cached_weights(layer):
        first = OPS.grouped_linear(x, holder.weight.transpose(1, 2), offsets)
        alias.zero_()
        second = OPS.grouped_linear(x, holder.weight.transpose(1, 2), offsets)
        with torch.no_grad():
            holder.weight.mul_(2)  # counts one
        third = OPS.grouped_linear(x, holder.weight.transpose(1, 2), offsets)
    assert_same_bits(first, expected)
    assert_same_bits(second, expected)
    assert float(third.abs().max()) == 0
