"""fp8.MergedLinear, and merged_linear inside fp8.cached_weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from reference import assert_same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fp8


class Calls(TorchDispatchMode):
    """Counts merged operators and single ones."""

    def __init__(self):
        super().__init__()
        self.merged = self.single = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.merged += name in ("fp8._merged_forward.default", "fp8.merged_linear.default")
        self.single += name in ("fp8._linear_forward.default", "fp8.fused_linear.default")
        return func(*args, **(kwargs or {}))


def count(call, *args):
    with Calls() as calls:
        call(*args)
    return calls.merged, calls.single


def make(recipe="rowwise", **options) -> fp8.MergedLinear:
    torch.manual_seed(2)
    return fp8.MergedLinear(32, {"q": 32, "k": 8, "v": 16}, recipe=recipe, **options)


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_merged_module_is_one_product(recipe):
    module, x = make(recipe), torch.randn(2, 5, 32)
    assert count(module, x) == (1, 0)
    ys = module(x)
    assert isinstance(ys, tuple)
    if fp8.RECIPES[recipe].granularity == "rowwise":
        for y, layer in zip(ys, (module.q, module.k, module.v), strict=True):
            assert_same_bits(y.contiguous(), layer(x))
    sum(y.sum() for y in ys).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_merged_module_parameters_are_the_layers():
    module = make(bias=[True, False, True], dtype=torch.bfloat16)
    assert list(module.state_dict()) == ["q.weight", "q.bias", "k.weight", "v.weight", "v.bias"]
    plain = nn.ModuleDict(
        {n: nn.Linear(32, f, n != "k") for n, f in (("q", 32), ("k", 8), ("v", 16))}
    )
    module.load_state_dict(plain.state_dict())
    assert torch.equal(module.k.weight, plain["k"].weight.bfloat16())
    unnamed = fp8.MergedLinear(16, [8, 8])
    assert list(unnamed._modules) == ["0", "1"]


def test_merged_module_copies():
    module, x = make("delayed"), torch.randn(4, 32)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        for y, theirs in zip(other(x), expected, strict=True):
            assert_same_bits(y.contiguous(), theirs.contiguous())


@pytest.mark.parametrize("way", ["hook", "static", "main_grad", "forward", "recipe", "replaced"])
def test_merged_module_steps_aside(way):
    module, x = make("tensorwise"), torch.randn(4, 32)
    if way == "hook":
        module.k.register_forward_hook(lambda m, args, y: y + 1)
    elif way == "static":
        module.k.input_scale = torch.tensor(0.01)
    elif way == "main_grad":
        module.k.weight.main_grad = torch.zeros_like(module.k.weight)
    elif way == "forward":
        module.k.forward = lambda x: x[..., :8]
    elif way == "recipe":
        module.k.recipe = "rowwise"
    else:
        module.k = nn.Linear(32, 8)
    assert count(module, x)[0] == 0
    for y, layer in zip(module(x), module._modules.values(), strict=True):
        assert_same_bits(y, layer(x))


def test_merged_module_refuses():
    with pytest.raises(ValueError, match="out_features of a layer, got none"):
        fp8.MergedLinear(16, [])
    with pytest.raises(ValueError, match="bias for each of 2 layers, got 1"):
        fp8.MergedLinear(16, [8, 8], bias=[True])
    with pytest.raises(ValueError, match="recipe"):
        fp8.MergedLinear(16, [8, 8], recipe="unknown")


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_merged_weights_are_cached(recipe):
    """The same bits, and codes that are made anew once one of the weights may have changed."""
    module, x = make(recipe), torch.randn(4, 32)

    def step(x):
        module.zero_grad()
        ys = module(x)
        torch.autograd.backward(ys, [torch.cos(y.detach()) for y in ys])
        return [*(y.detach().clone() for y in ys), *(p.grad.clone() for p in module.parameters())]

    def same(ours, theirs):
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a, b)

    expected = [step(x), step(2 * x)]
    with fp8.cached_weights(module):
        same(step(x), expected[0])
        same(step(2 * x), expected[1])
        module.v.weight.data.mul_(2)  # no version counter sees it
        after = step(x)
    same(after, step(x))
    assert not torch.equal(after[2], expected[0][2])
    with fp8.cached_weights(module), torch.no_grad():
        first = [y.clone() for y in module(x)]
        module.k.weight.add_(1)
        assert not torch.equal(module(x)[1], first[1])


def test_merged_cached_weights_are_quantized_once():
    module, x = make("tensorwise", bias=False), torch.randn(4, 32)
    with fp8.cached_weights(module):
        ys = module(x)
        with torch.no_grad():
            for parameter in module.parameters():  # by a write that nothing notices
                torch.ops.fp8._recipes()
                parameter.detach().data.zero_()
            assert all(bool(y.any()) for y in module(x))
    assert not any(bool(y.any()) for y in module(x))
    assert all(bool(y.any()) for y in ys)
