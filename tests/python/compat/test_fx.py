"""torch.fx.symbolic_trace of models with fp8.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

import fp8


def model(recipe="tensorwise"):
    layers = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    return fp8.convert(layers, recipe, filter=lambda module, name: True)


def assert_same(traced, original, x):
    """Values, and gradients of the parameters, which the two share."""
    results = []
    for run in (traced, original):
        leaf = x.clone().requires_grad_()
        original.zero_grad()
        y = run(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in original.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_fx_traces_a_layer_as_nn_linear(recipe):
    original = model(recipe)
    traced = fx.symbolic_trace(original)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert_same(traced, original, torch.randn(5, 32))
    x = torch.randn(5, 32)
    assert torch.equal(copy.deepcopy(traced)(x), original(x))


def test_fx_keeps_static_scales_and_main_grad():
    original, x = model(), torch.randn(5, 32)
    with torch.no_grad(), fp8.calibrate(original):
        original(x)
    traced = fx.symbolic_trace(original)
    assert_same(traced, original, x * 2)
    assert torch.equal(traced.get_submodule("0").input_scale, original[0].input_scale)
    original[0].weight.main_grad = torch.zeros(48, 32)
    fx.symbolic_trace(original)(x).sum().backward()
    expected = torch.zeros(48, 32)
    original[0].weight.main_grad, ours = expected, original[0].weight.main_grad
    original(x).sum().backward()
    assert ours.abs().sum() > 0
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("static", [False, True])
def test_fx_of_a_layer_itself(static):
    layer, x = fp8.Linear(32, 16), torch.randn(5, 32)
    if static:
        layer.input_scale = torch.tensor(0.01)
    traced = fx.symbolic_trace(layer)
    assert torch.equal(traced(x), layer(x))
    targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.fp8.fused_linear.default]
    layer.weight.main_grad = torch.zeros(16, 32)
    assert torch.equal(fx.symbolic_trace(layer)(x), layer(x))


def test_fx_of_a_constant_input():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(5, 32))
            self.layer = fp8.Linear(32, 32)

        def forward(self, x):
            return x + self.layer(self.table)

    original = Positions()
    assert_same(fx.symbolic_trace(original), original, torch.randn(5, 32))


def test_fx_of_grouped_layers():
    layer, offsets = fp8.GroupedLinear(2, 32, 16), torch.tensor([2, 5], dtype=torch.int32)
    x = torch.randn(5, 32)
    assert torch.equal(fx.symbolic_trace(layer)(x, offsets), layer(x, offsets))
    layer.weight.main_grad = torch.zeros(layer.weight.shape)
    with pytest.raises(NotImplementedError, match=r"without main_grad under torch\.fx"):
        fx.symbolic_trace(layer)


def test_fx_runs_hooks_once():
    layers, x = nn.Sequential(fp8.Linear(32, 16), nn.ReLU()), torch.randn(5, 32)
    layers[0].register_forward_hook(lambda module, args, y: y * 2)
    layers[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert torch.equal(fx.symbolic_trace(layers)(x), layers(x))


def test_fx_of_a_model_that_uses_a_layer_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"a": fp8.Linear(16, 16, recipe="rowwise")})

        def forward(self, x, scale: float = 2.0):
            return self.inner["a"](torch.relu(self.inner["a"](x))) * scale

    original = Twice()
    assert_same(fx.symbolic_trace(original), original, torch.randn(3, 16))
