"""What only a GPU shows of the amax that a norm leaves: kernels of every kind, launches, streams,
graphs."""

from __future__ import annotations

import pytest
import test_norm_amax as cpu
import torch
from norm_reference import FORMS, LAYER
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.gpu

# As in test_norm_cuda.py: blocks that stay, slots of 1 to 512 threads, few rows; a row too long for
# a block, of which no amax is left.
SHAPES = (
    *((1, 4096), (3, 128), (530, 4096), (4400, 4096), (2200, 8192), (1100, 16384), (40_000, 8)),
    *((140_001, 128), (17_001, 1001), (600, 264), (4096, 4096), (7, 20_000)),
)


def kernels(step):
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        step()
        torch.cuda.synchronize()
    return [e.name for e in prof.events() if "fp8::core" in e.name]


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_leaves_the_amax_of_what_it_wrote(shape, adds, form, poisoned_memory):
    if form == LAYER and adds:
        pytest.skip("LayerNorm adds none")
    x, weight, bias, residual = cpu.leaves("cuda", *shape)
    with torch.no_grad():  # the largest lies anywhere
        x[torch.randint(shape[0], ()), torch.randint(shape[1], ())] = 200
    layer = cpu.linear("cuda", shape[1])

    def make():
        return cpu.norm(form, x, weight, bias, residual if adds else None)

    cpu.learn(make, layer)
    y = make()
    assert torch.equal(layer(y), layer(y.clone()))
    assert cpu.is_used(make, layer) == (shape[1] <= 16384)


def test_fp32_leaves_none():
    x, weight, *_ = cpu.leaves("cuda", dtype=torch.float32)
    layer = cpu.linear("cuda", dtype=torch.float32)
    cpu.learn(lambda: cpu.norm(FORMS[0], x, weight), layer)
    assert not cpu.is_used(lambda: cpu.norm(FORMS[0], x, weight), layer)


@pytest.mark.parametrize("rows", [512, 16_384])
def test_the_quantization_is_one_launch(rows):
    x, weight, *_ = cpu.leaves("cuda", rows, 4096)
    layer = cpu.linear("cuda", 4096)
    cpu.learn(lambda: cpu.norm(FORMS[0], x, weight), layer)
    y = cpu.norm(FORMS[0], x, weight)
    copied = y * 1
    ours, own = kernels(lambda: layer(y)), kernels(lambda: layer(copied))
    assert len([name for name in own if "statistics" in name or "cooperative" in name]) == 2
    assert len([name for name in ours if "statistics" in name or "cooperative" in name]) == 1
    made = kernels(lambda: cpu.norm(FORMS[0], x, weight))
    assert len(made) == 1, made


def test_an_amax_stays_on_its_stream():
    x, weight, *_ = cpu.leaves("cuda")
    layer = cpu.linear("cuda")
    cpu.learn(lambda: cpu.norm(FORMS[0], x, weight), layer)
    y = cpu.norm(FORMS[0], x, weight)
    cpu.write_unseen(y)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        ours, expected = layer(y), layer(y.clone())
    torch.cuda.current_stream().wait_stream(other)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("inside", [True, False])
def test_in_a_graph_it_is_made_anew(inside):
    """inside: the norm is captured too, and replays leave the amax that a replay needs."""
    x, weight, *_ = cpu.leaves("cuda", 512, 256)
    layer = cpu.linear("cuda", 256)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        cpu.learn(lambda: cpu.norm(FORMS[0], x, weight), layer)
        torch.autograd.grad(layer(cpu.norm(FORMS[0], x, weight)).sum(), x)
    torch.cuda.current_stream().wait_stream(warm)
    y = cpu.norm(FORMS[0], x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if inside:
            y = cpu.norm(FORMS[0], x, weight)
        made = layer(y)
    for factor in (1, 30):
        with torch.no_grad():
            (x[3:5] if inside else y.data).mul_(factor)
            if inside:
                weight.mul_(factor)
        graph.replay()
        of_x = cpu.norm(FORMS[0], x, weight) if inside else y
        assert torch.equal(made, layer(of_x.clone()))


@pytest.mark.parametrize("form", [FORMS[1], LAYER])
def test_steps_have_the_bits_of_steps_without(form):
    x, weight, bias, _ = cpu.leaves("cuda", 4500, 4096)
    layers = [cpu.linear("cuda", 4096) for _ in range(3)]
    dy = torch.randn(4500, 48, device="cuda", dtype=torch.bfloat16)

    def step(copied):
        y = cpu.norm(form, x, weight, bias)
        y = y * 1 if copied else y
        outputs = [layer(y) for layer in layers]
        wanted = [x, weight, *(layer.weight for layer in layers)]
        return [*outputs, *torch.autograd.grad(outputs, wanted, [dy] * 3)]

    for _ in range(3):
        for ours, expected in zip(step(False), step(True), strict=True):
            assert torch.equal(ours, expected)
