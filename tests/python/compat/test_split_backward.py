"""Backwards that are for some of the gradients alone: they make those, with the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode

import fp8

OPS = torch.ops.fp8
BACKWARDS = (
    OPS._linear_backward.default,
    OPS._grouped_backward.default,
    OPS._moe_backward.default,
)


class Asked(TorchDispatchMode):
    """What each backward of ours was asked for, by the names of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[set[str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in BACKWARDS:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            asked = {name for name, value in named.items() if value is True and "needs" in name}
            if "needs" in named:
                asked = {f"bit {i}" for i in range(6) if named["needs"] >> i & 1}
            self.calls.append(asked)
        return func(*args, **(kwargs or {}))


def subsets(names):
    return [
        chosen
        for count in range(1, len(names) + 1)
        for chosen in itertools.combinations(names, count)
    ]


def check_subsets(y, leaves, dy, names):
    """leaves: name -> tensor; names: name -> what its backward calls it."""
    whole = dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy, True), strict=True))
    for chosen in subsets(list(leaves)):
        with Asked() as mode:
            grads = torch.autograd.grad(y, [leaves[n] for n in chosen], dy, retain_graph=True)
        assert mode.calls == [{names[n] for n in chosen}], chosen
        for name, grad in zip(chosen, grads, strict=True):
            if name == "bias":  # summed by itself, or on the way of a quantization: another order
                torch.testing.assert_close(grad, whole[name])
            else:
                assert torch.equal(grad, whole[name]), (chosen, name)


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_fused_linear_makes_what_is_asked_for(device, recipe):
    x = torch.randn(2, 20, 32, device=device, requires_grad=True)
    weight = torch.randn(48, 32, device=device, requires_grad=True)
    bias = torch.randn(48, device=device, requires_grad=True)
    y = OPS.fused_linear(x, weight, bias, recipe)
    leaves = {"x": x, "weight": weight, "bias": bias}
    names = {"x": "needs_dx", "weight": "needs_dweight", "bias": "needs_dbias"}
    check_subsets(y, leaves, torch.randn_like(y), names)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp"])
def test_grouped_linear_makes_what_is_asked_for(device, recipe):
    x = torch.randn(20, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 48, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(3, 48, device=device, dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.tensor([7, 7, 20], dtype=torch.int32, device=device)
    y = OPS.grouped_linear(x, weight, offsets, bias, recipe)
    leaves = {"x": x, "weight": weight, "bias": bias}
    names = {"x": "needs_dx", "weight": "needs_dweight", "bias": "needs_dbias"}
    check_subsets(y, leaves, torch.randn_like(y), names)


BIASES = ("gate_up_bias", "down_bias")


@pytest.mark.parametrize("biases", [(), *subsets(BIASES)], ids="-".join)
@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp"])
def test_moe_experts_makes_what_is_asked_for(device, recipe, biases):
    shapes = {
        "x": (24, 32),
        "weights": (24, 2),
        "gate_up": (4, 96, 32),
        "down": (4, 32, 48),
        "gate_up_bias": (4, 96),
        "down_bias": (4, 32),
    }
    bits = {name: f"bit {i}" for i, name in enumerate(shapes)}
    leaves = {
        name: torch.randn(shape, device=device, dtype=torch.bfloat16).div_(4).requires_grad_()
        for name, shape in shapes.items()
        if "bias" not in name or name in biases
    }
    index = torch.randint(4, (24, 2), device=device)
    y = OPS.moe_experts(
        *(leaves["x"], index, leaves["weights"], leaves["gate_up"], leaves["down"]),
        *(leaves.get("gate_up_bias"), leaves.get("down_bias")),
        *("silu", False, 1.702, 7.0, recipe),
    )
    check_subsets(y, leaves, torch.randn_like(y), bits)


def test_main_grad_in_a_split_backward(device):
    """First without the weight, which leaves the buffer alone, then the weight alone."""
    layer = fp8.Linear(32, 48, device=device)
    layer.weight.main_grad = torch.zeros(48, 32, device=device)
    x = torch.randn(20, 32, device=device, requires_grad=True)
    y = layer(x)
    with Asked() as mode:
        torch.autograd.grad(y.sum(), [x, layer.bias], retain_graph=True)
        assert not layer.weight.main_grad.any()
        y.sum().backward(inputs=[layer.weight])
    assert mode.calls == [{"needs_dx", "needs_dbias"}, {"needs_dweight"}]
    assert layer.weight.grad is None, "into the buffer alone"
    main_grad = layer.weight.main_grad
    del layer.weight.main_grad
    layer(x).sum().backward()
    torch.testing.assert_close(main_grad, layer.weight.grad)


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_a_pipeline_that_splits_the_backward(device, recipe):
    """torch.distributed.pipelining: inputs first, weights later; no product is made twice."""
    torch.manual_seed(0)
    model = nn.Sequential(
        fp8.Linear(32, 48, device=device, recipe=recipe, bias=False),
        nn.GELU(),
        fp8.Linear(48, 32, device=device, recipe=recipe, bias=False),
    )
    x = torch.randn(20, 32, device=device, requires_grad=True)
    dy = torch.randn(20, 32, device=device)
    model(x).backward(dy)
    expected = [x.grad, *(p.grad for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    y = model(x)
    with Asked() as mode:
        (dx,), groups = stage_backward_input([y], [dy], [x], model.parameters())
        assert mode.calls == [{"needs_dx"}] * 2
        stage_backward_weight(model.parameters(), groups)
    assert mode.calls[2:] == [{"needs_dweight"}] * 2
    for found, wanted in zip([dx, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(found, wanted)
