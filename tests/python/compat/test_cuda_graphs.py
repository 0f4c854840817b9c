"""CUDA graphs: capture after one warm-up, replay with other inputs and weights, equal to eager."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from reference import assert_same_bits
from torch import nn

import fp8

pytestmark = pytest.mark.gpu
RECIPES = tuple(fp8.RECIPES)


def model(recipe: str) -> nn.Module:
    options = {"device": "cuda", "dtype": torch.bfloat16, "recipe": recipe}
    return nn.Sequential(
        fp8.Linear(256, 384, **options), nn.ReLU(), fp8.Linear(384, 200, **options)
    )


def step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def warm_up(run) -> None:
    """As torch's documentation asks: on a side stream, before the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("recipe", RECIPES)
def test_cuda_graph_of_forward_and_backward(recipe):
    module = model(recipe)
    x = torch.randn(144, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(144, 200, device="cuda", dtype=torch.bfloat16)
    warm_up(lambda: step(module, x, dy))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x, dy)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * torch.randint(1, 9, (), device="cuda"))
            dy.copy_(torch.randn_like(dy))
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
        graph.replay()
        replayed = [tensor.detach().clone() for tensor in captured]
        for i, (ours, eager) in enumerate(zip(replayed, step(module, x, dy), strict=True)):
            assert_same_bits(ours, eager.detach(), f"result {i}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_cuda_graph_with_eager_calls_around(recipe):
    """Nothing made outside a capture is reused inside, nor the other way round."""
    module = model(recipe)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    module(x)  # the same tensor, just before
    warm_up(lambda: module(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    after_capture = module(x)  # x was not written since
    graph.replay()
    assert_same_bits(y.detach(), after_capture.detach())
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_same_bits(y.detach(), module(x).detach())


@pytest.mark.parametrize("recipe", RECIPES)
def test_make_graphed_callables(recipe):
    module, eager = model(recipe), model(recipe)
    eager.load_state_dict(module.state_dict())
    sample = torch.randn(80, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(module, (sample,))
    x = torch.randn_like(sample).requires_grad_()
    for run in (graphed, eager):
        run(x).square().sum().backward()
    for ours, theirs in zip(module.parameters(), eager.parameters(), strict=True):
        assert_same_bits(ours.grad, theirs.grad)


def test_cuda_graph_without_warm_up():
    """Shapes never seen: the capture works, or the error asks for one run before it."""
    program = textwrap.dedent(
        """
        import torch, fp8
        layer = fp8.Linear(272, 304, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(48, 272, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                y = layer(x)
        except RuntimeError as error:
            context = error
            while context is not None:
                print("error:", context)
                context = context.__context__
        else:
            graph.replay()
            print("equal:", torch.equal(y, layer(x)))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "error:" in done.stdout:
        assert "before" in done.stdout, done.stdout
        assert "captur" in done.stdout, done.stdout
    else:
        assert "equal: True" in done.stdout


@pytest.mark.parametrize("recipe", ["tensorwise", "tensorwise:power_of_two"])
def test_cuda_graph_with_static_scales(recipe):
    """A replay reads the scales that the buffers hold then."""
    module = model(recipe)
    for layer in (module[0], module[2]):
        layer.input_scale = torch.tensor(0.01, device="cuda")
    x = torch.randn(144, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(144, 200, device="cuda", dtype=torch.bfloat16)
    warm_up(lambda: step(module, x, dy))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x, dy)
    for value in (0.01, 0.5, 1e-4):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            module[0].input_scale.fill_(value)
        graph.replay()
        replayed = [tensor.detach().clone() for tensor in captured]
        for i, (ours, eager) in enumerate(zip(replayed, step(module, x, dy), strict=True)):
            assert_same_bits(ours, eager.detach(), f"scale {value}, result {i}")
