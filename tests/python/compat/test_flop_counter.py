"""FlopCounterMode counts for FP8 layers what it counts for the same model in high precision."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import samples
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fp8
from fp8._native import flops as _flops


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def pair(recipe):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 20))
    return plain, fp8.convert(copy.deepcopy(plain), recipe, filter=lambda *_: True)


def test_flops_of_every_product():
    """Operators without a product count nothing: quantizing, dequantizing, norms and rope."""
    without = ("quantize", "norm", "rope")  # and "dequantize"
    none = {n for n in samples.namespace() if any(word in n for word in without)}
    known = {str(op).removeprefix("fp8.") for op in _flops.FORMULAS}
    assert known == set(samples.namespace()) - none


@pytest.mark.parametrize("recipe", sorted(fp8.RECIPES))
@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("main_grad", [True, False])
def test_flops_of_linear_layers(recipe, x_grad, frozen, main_grad):
    plain, layers = pair(recipe)
    x = torch.randn(5, 7, 32, requires_grad=x_grad)
    for model in (plain, layers):
        model[0].weight.requires_grad_(not frozen)
    if main_grad:
        for layer in (layers[0], layers[2]):
            layer.weight.main_grad = torch.zeros_like(layer.weight)
    for run in (lambda m: m(x).sum().backward(), lambda m: m(x)):
        expected = count(lambda: run(plain))  # noqa: B023
        assert expected > 0
        assert count(lambda: run(layers)) == expected  # noqa: B023
    with torch.no_grad():
        assert count(lambda: layers(x)) == count(lambda: plain(x)) == 2 * 35 * (32 * 48 + 48 * 20)


def test_flops_by_module():
    _, layers = pair("tensorwise")
    with FlopCounterMode(display=False) as counter:
        layers(torch.randn(5, 32))
    counts = counter.get_flop_counts()
    assert counts["Sequential.0"] == {torch.ops.fp8._linear_forward: 2 * 5 * 32 * 48}


def test_flops_of_scaled_mm():
    a, scale_a = fp8.ops.quantize_rowwise(torch.randn(8, 32))
    b, scale_b = fp8.ops.quantize_rowwise(torch.randn(16, 32))
    assert count(lambda: fp8.ops.scaled_mm(a, b, scale_a, scale_b)) == 2 * 8 * 16 * 32
    out = torch.zeros(8, 16)
    run = lambda: fp8.ops.scaled_mm_accumulate_(out, a, b, scale_a, scale_b)  # noqa: E731
    assert count(run) == 2 * 8 * 16 * 32


@pytest.mark.parametrize("recipe", fp8.GROUPED_RECIPES)
def test_flops_of_grouped_layers(recipe):
    """Those of a loop over the groups."""
    layer = fp8.GroupedLinear(3, 32, 48, recipe=recipe)
    offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
    x = torch.randn(8, 32, requires_grad=True)

    def loop():
        rows = [x[:3], x[3:3], x[3:]]
        return torch.cat([r @ w.t() for r, w in zip(rows, layer.weight, strict=True)])

    assert count(lambda: layer(x, offsets)) == count(loop) == 2 * 8 * 32 * 48
    run = count(lambda: layer(x, offsets).sum().backward())
    assert run == count(lambda: loop().sum().backward()) == 3 * 2 * 8 * 32 * 48


@pytest.mark.parametrize("wanted", ["all", "x", "weights", "nothing"])
def test_flops_of_experts(wanted):
    """Those of a loop over the experts, with the routing given."""
    hidden, inner, experts, tokens, k = 32, 16, 4, 6, 2
    grad = {"x": wanted in ("all", "x"), "weights": wanted in ("all", "weights")}
    x = torch.randn(tokens, hidden, requires_grad=grad["x"])
    gate_up = torch.randn(experts, 2 * inner, hidden, requires_grad=grad["weights"])
    down = torch.randn(experts, hidden, inner, requires_grad=grad["weights"])
    routing = torch.rand(tokens, k, requires_grad=wanted == "all")
    index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])

    def loop():
        y = torch.zeros(tokens, hidden)
        for expert in range(experts):
            token, slot = (index == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ gate_up[expert].t()).chunk(2, -1)
            out = (nn.functional.silu(gate) * up) @ down[expert].t()
            y = y.index_add(0, token, out * routing[token, slot, None])
        return y

    def ours():
        return fp8.ops.moe_experts(x, index, routing, gate_up, down)

    assert count(ours) == count(loop) == 2 * tokens * k * 3 * inner * hidden
    if wanted != "nothing":
        assert count(lambda: ours().sum().backward()) == count(lambda: loop().sum().backward())


@pytest.mark.parametrize("first", ["fp8", "torch.utils.flop_counter"])
def test_flops_whichever_is_imported_first(first):
    """And `import fp8` does not import the counter, which brings triton, and leaves what is loaded
    alone: formulas come with the first operator that a counter meets."""
    program = f"""
import sys, {first}
print("torch.utils.flop_counter" in sys.modules)
import fp8, torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry
print(any("fp8." in str(op) for op in flop_registry))
with FlopCounterMode(display=False) as counter:
    fp8.Linear(16, 16)(torch.randn(2, 16))
print(counter.get_total_flops())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == [str(first != "fp8"), "False", "1024"]
