"""Experts on a GPU: nothing waits for it, and everything can be captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, experts_of, make, only_experts, routing

import fp8

pytestmark = pytest.mark.gpu
RECIPES = ("rowwise", "rowwise_gw_hp")


@pytest.fixture(params=FAMILIES)
def problem(request):
    """An experts module in FP8, and its arguments."""
    model = make(request.param, "cuda", torch.bfloat16)
    fp8.convert(model, filter=only_experts)
    module = next(iter(experts_of(model).values()))
    hidden = torch.randn(160, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index, weights = routing(160, 2, module.num_experts, "cuda", torch.bfloat16)
    return module, hidden, index, weights.requires_grad_()


def step(module, hidden, index, weights, dy):
    y = module(hidden, index, weights)
    return [y, *torch.autograd.grad(y, [hidden, weights, *module.parameters()], dy)]


@pytest.fixture
def no_waiting():
    """Raises where the host waits for the GPU."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", [True, False])
def test_experts_do_not_wait(problem, no_waiting, monkeypatch, fused):
    if not fused:
        monkeypatch.setattr(fp8.integrations.transformers._experts, "gate_of", lambda module: None)
    module, hidden, index, weights = problem
    dy = torch.randn_like(hidden)
    step(module, hidden, index, weights, dy)  # first calls may look at the device
    no_waiting(True)
    step(module, hidden, index, weights, dy)
    with torch.no_grad(), fp8.cached_weights(module):
        module(hidden, index, weights)
        module(hidden, index, weights)


@pytest.mark.parametrize("fused", [True, False])
def test_experts_in_a_cuda_graph(problem, monkeypatch, fused):
    """Replayed with another input and another routing, sentinels among it: eager's bits."""
    if not fused:
        monkeypatch.setattr(fp8.integrations.transformers._experts, "gate_of", lambda module: None)
    module, hidden, index, weights = problem
    dy = torch.randn_like(hidden)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(module, hidden, index, weights, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, hidden, index, weights, dy)
    for _ in range(3):
        with torch.no_grad():
            hidden.copy_(torch.randn_like(hidden))
            dy.copy_(torch.randn_like(dy))
            index.copy_(torch.randint_like(index, module.num_experts + 1))
            module.down_proj.mul_(-1.25)
        graph.replay()
        replayed = [tensor.detach().clone() for tensor in captured]
        for ours, eager in zip(replayed, step(module, hidden, index, weights, dy), strict=True):
            assert torch.equal(ours, eager.detach())


def test_experts_make_graphed_callables():
    model = fp8.convert(make("mixtral", "cuda", torch.bfloat16), filter=only_experts)
    module = next(iter(experts_of(model).values()))
    index, weights = routing(64, 2, 4, "cuda", torch.bfloat16)
    sample = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = module(sample, index, weights).detach().clone()
    graphed = torch.cuda.make_graphed_callables(
        module, (sample, index, weights.detach().requires_grad_())
    )
    assert torch.equal(graphed(sample, index, weights), expected)
