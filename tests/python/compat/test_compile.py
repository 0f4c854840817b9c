"""torch.compile: one graph, the eager bits, static and dynamic M."""

from __future__ import annotations

import shutil

import pytest
import torch
from reference import assert_same_bits
from torch import nn

import fp8

RECIPES = tuple(fp8.RECIPES)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def model(recipe: str, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """ReLU between: compiled and eager ReLU give equal bits, so everything can be compared so."""
    layers = nn.Sequential(
        fp8.Linear(64, 96, device=device, dtype=dtype, recipe=recipe),
        nn.ReLU(),
        fp8.Linear(96, 40, bias=False, device=device, dtype=dtype, recipe=recipe),
    )
    return layers


def step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y and all gradients."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def assert_equals_eager(eager: nn.Module, compiled: nn.Module, m: int, device: str) -> None:
    x = torch.randn(m, 64, device=device, dtype=torch.bfloat16)
    dy = torch.randn(m, 40, device=device, dtype=torch.bfloat16)
    expected = step(eager, x, dy)
    for i, (ours, theirs) in enumerate(zip(step(compiled, x, dy), expected, strict=True)):
        assert_same_bits(ours, theirs, f"M={m}, result {i}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_compile_equals_eager(device, recipe):
    eager = model(recipe, device)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    assert_equals_eager(eager, compiled, 48, device)


@pytest.mark.slow
def test_compile_with_inductor(device):
    """One recipe on the CPU, where generated code takes a while to build."""
    if device == "cpu" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    for recipe in RECIPES if device == "cuda" else RECIPES[:1]:
        eager = model(recipe, device)
        compiled = torch.compile(eager, fullgraph=True)
        assert_equals_eager(eager, compiled, 48, device)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_compile_dynamic_m(device, how, recipe):
    """One compilation serves every number of tokens."""
    eager = model(recipe, device)
    compiled = torch.compile(
        eager, backend="aot_eager", fullgraph=True, dynamic=True if how == "dynamic" else None
    )
    for m in (24, 40, 17, 128):
        x = torch.randn(m, 64, device=device, dtype=torch.bfloat16)
        dy = torch.randn(m, 40, device=device, dtype=torch.bfloat16)
        expected = step(eager, x, dy)
        given = x.clone().requires_grad_()
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(given, 0)
        y = compiled(given)
        ours = [y.detach(), *torch.autograd.grad(y, [given, *eager.parameters()], dy)]
        for i, (actual, wanted) in enumerate(zip(ours, expected, strict=True)):
            assert_same_bits(actual, wanted, f"M={m}, result {i}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled"


@pytest.mark.parametrize("recipe", RECIPES)
def test_compile_without_grad(device, recipe):
    eager = model(recipe, device)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 8, 64, device=device, dtype=torch.bfloat16)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same_bits(compiled(x), eager(x))


@pytest.mark.parametrize("recipe", RECIPES)
def test_compile_under_autocast(device, recipe):
    eager = model(recipe, device, torch.float32)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    x, dy = torch.randn(24, 64, device=device), torch.randn(24, 40, device=device)

    def run(module):
        with torch.autocast(device, dtype=torch.bfloat16):
            return step(module, x, dy.bfloat16())

    for ours, theirs in zip(run(compiled), run(eager), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "blockwise_1x128", "blockwise_128x128"])
def test_compile_operators_on_their_own(device, name):
    """Quantize, matmul and accumulate in one graph, with the functionalized in-place operator."""

    def chain(x, w, out):
        ops = torch.ops.fp8
        quantize = getattr(ops, f"quantize_{name}")
        (a, scale_a), (b, scale_b) = quantize(x), quantize(w)
        ops.scaled_mm_accumulate_(out, a, b, scale_a, scale_b)
        return ops.scaled_mm(a, b, scale_a, scale_b), ops.dequantize(a, scale_a)

    x, w = torch.randn(20, 300, device=device), torch.randn(28, 300, device=device)
    outs = [torch.ones(20, 28, device=device) for _ in range(2)]
    expected = chain(x, w, outs[0])
    actual = torch.compile(chain, backend="aot_eager", fullgraph=True)(x, w, outs[1])
    for ours, theirs in zip((*actual, outs[1]), (*expected, outs[0]), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("recipe", ["tensorwise", "tensorwise:power_of_two"])
def test_compile_with_static_scales(device, recipe):
    """The scale is a buffer, an input of the graph: another value needs no other code."""
    eager = model(recipe, device)
    layers = [module for module in eager.modules() if isinstance(module, fp8.Linear)]
    for layer in layers:
        layer.input_scale = torch.tensor(0.01, device=device)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    for value in (0.01, 0.3):
        layers[0].input_scale.fill_(value)
        assert_equals_eager(eager, compiled, 48, device)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled"


def test_compile_with_power_of_two_scales(device):
    for recipe in ("rowwise:power_of_two", "rowwise_gw_hp:power_of_two"):
        eager = model(recipe, device)
        compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
        assert_equals_eager(eager, compiled, 40, device)
