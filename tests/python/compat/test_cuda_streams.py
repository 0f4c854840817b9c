"""Streams and synchronization: the current stream is used, and the host never waits for the GPU."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_bits

import fp8

pytestmark = pytest.mark.gpu
RECIPES = tuple(fp8.RECIPES)


def problem(m: int = 512, k: int = 256, n: int = 384):
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    return x, torch.randn(m, n, device="cuda", dtype=torch.bfloat16)


def step(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_non_default_stream(recipe):
    """Inputs that are written late on the same stream are waited for: no kernel runs elsewhere."""
    layer = fp8.Linear(256, 384, device="cuda", dtype=torch.bfloat16, recipe=recipe)
    x, dy = problem()
    expected = step(layer, x, dy)
    late_x, late_dy = torch.zeros_like(x), torch.zeros_like(dy)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_x.copy_(x)
        late_dy.copy_(dy)
        actual = step(layer, late_x, late_dy)
    stream.synchronize()
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_input_on_two_streams(recipe):
    """A quantized input may be remembered, but not handed from one stream to another unordered."""
    layer = fp8.Linear(256, 384, device="cuda", dtype=torch.bfloat16, recipe=recipe)
    x, _ = problem()
    expected = layer(x).detach()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            torch.cuda._sleep(1_000_000 * (i % 3))
            results.append(layer(x).detach())
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_synchronization(recipe, dtype):
    layer = fp8.Linear(256, 384, device="cuda", dtype=dtype, recipe=recipe)
    x, dy = (tensor.to(dtype) for tensor in problem())
    step(layer, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, dy)
        with torch.no_grad():
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(0, 256), (1, 256), (7, 250), (33, 40)], ids=str)
def test_no_synchronization_odd_shapes(shape):
    layer = fp8.Linear(shape[1], 100, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(shape[0], 100, device="cuda", dtype=torch.bfloat16)
    step(layer, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    """The tensors' device counts, not the current one."""
    layer = fp8.Linear(256, 384, device="cuda:1", dtype=torch.bfloat16)
    x, dy = (tensor.to("cuda:1") for tensor in problem())
    with torch.cuda.device(1):
        expected = step(layer, x, dy)
    for ours, theirs in zip(step(layer, x, dy), expected, strict=True):
        assert ours.device == torch.device("cuda:1")
        assert_same_bits(ours, theirs)
