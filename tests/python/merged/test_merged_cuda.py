"""merged_linear on a GPU: quantizations that read the parts where they lie, to the bit; launches,
memory, graphs and streams; and fused siblings there."""

from __future__ import annotations

import copy

import merged_reference as reference
import pytest
import sibling_models as models
import torch
from merged_reference import RECIPES, problem
from reference import assert_same_bits
from sibling_models import Block, convert, products
from test_merged_values import assert_same_steps
from torch.profiler import ProfilerActivity, profile

import fp8

pytestmark = pytest.mark.gpu

# Whole tiles, parts of tiles, parts that begin within one; rows of one part in several clusters.
SHAPES = {
    "llama": ((2048,), 4096, (4096, 1024, 1024)),
    "two": ((1000,), 1032, (2824, 2824)),
    "narrow": ((300,), 264, (8, 24, 40, 16)),
    "wide": ((70,), 8200, (128, 264)),
    "one row": ((1,), 512, (256, 64)),
    "blocks that straddle": ((260,), 392, (72, 200, 136)),
}


@pytest.mark.parametrize("recipe", [*RECIPES, "tensorwise:power_of_two", "rowwise:power_of_two"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_merged_reads_parts_where_they_lie(recipe, shape, dtype, bias):
    size, k, rows = SHAPES[shape]
    p = problem(size, k, rows, dtype, (bias,) * len(rows), "cuda")
    ours = reference.merged(p, recipe)
    theirs = reference.joined(p, recipe)
    assert_same_steps(ours, theirs, recipe, exact_dweight=False)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_merged_strides_on_a_gpu(recipe):
    """Slices of larger tensors, whose rows lie on 16 bytes or not."""
    for offset in (0, 8, 3):
        big = torch.randn(700, 600, device="cuda", dtype=torch.bfloat16)
        weights = [big[:256, offset : offset + 256], big[256:320, offset : offset + 256]]
        dys = [big[:96, offset : offset + 256], big[300:396, offset : offset + 64]]
        x = torch.randn(96, 256, device="cuda", dtype=torch.bfloat16)
        plain = reference.Problem(x, [w.clone() for w in weights], None, [d.clone() for d in dys])
        expected = reference.joined(plain, recipe)
        leaves = [w.detach().requires_grad_() for w in weights]
        x.requires_grad_()
        ys = fp8.ops.merged_linear(x, leaves, None, recipe)
        grads = torch.autograd.grad(ys, [x, *leaves], dys)
        for y, theirs in zip(ys, expected.ys, strict=True):
            assert_same_bits(y.detach().contiguous(), theirs.contiguous())
        for grad, theirs in zip(grads, [expected.dx, *expected.dweights], strict=True):
            assert_same_bits(grad, theirs.contiguous())


@pytest.mark.parametrize("bias", [False, True])
def test_merged_delayed_on_a_gpu(bias):
    ours, theirs = (fp8.ops.make_history("cuda") for _ in range(2))
    for turn in range(40):
        p = problem((200,), 264, (136, 64), biased=(bias, bias), device="cuda")
        p.x *= 1 + turn % 5
        p.dys[1] *= 1 + turn % 7
        if turn % 3 == 0:
            p.weights[0] *= 3
        made = reference.merged(p, "delayed", history=ours)
        assert_same_steps(made, reference.joined(p, "delayed", history=theirs), "delayed")
        assert torch.equal(ours, theirs), turn


def _launches(run) -> list[str]:
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in recorded.events() if event.device_type == cuda]


@pytest.mark.parametrize(("recipe", "most"), [("tensorwise", 15), ("delayed", 15), ("rowwise", 15)])
def test_merged_launches(recipe, most):
    """Three quantizations forward and backward of two launches at most, three products, which may
    reduce in a launch of their own, and no copy of a weight or a gradient."""
    p = problem((2048,), 1024, (1024, 256, 256), device="cuda")
    x, weights = p.x.requires_grad_(), [w.requires_grad_() for w in p.weights]
    history = {"history": fp8.ops.make_history("cuda")} if recipe == "delayed" else {}

    def run():
        for t in (x, *weights):
            t.grad = None
        torch.autograd.backward(fp8.ops.merged_linear(x, weights, None, recipe, **history), p.dys)

    found = _launches(run)
    assert len(found) <= most, found
    assert not any("CatArray" in name for name in found), found


def test_merged_memory():
    """Beside y and the codes nothing of the weights' size in high precision."""
    p = problem((64,), 4096, (4096, 1024, 1024), device="cuda")
    elements = sum(w.numel() for w in p.weights)
    with torch.no_grad():
        fp8.ops.merged_linear(p.x, p.weights)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fp8.ops.merged_linear(p.x, p.weights)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.2 * elements + 64 * 6144 * 4 + (34 << 20)  # and cuBLASLt's workspace


@pytest.mark.parametrize("recipe", RECIPES)
def test_merged_in_a_cuda_graph(recipe):
    p = problem((144,), 256, (128, 64), device="cuda")
    x, weights = p.x.requires_grad_(), [w.requires_grad_() for w in p.weights]

    def step():
        ys = fp8.ops.merged_linear(x, weights, None, recipe)
        return [*ys, *torch.autograd.grad(ys, [x, *weights], p.dys)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for factor in (2.0, -0.3):
        with torch.no_grad():
            for t in (x, *weights, *p.dys):
                t.mul_(factor)
        graph.replay()
        for ours, eager in zip(captured, step(), strict=True):
            assert_same_bits(ours.detach().contiguous(), eager.detach().contiguous())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_siblings_on_a_gpu(recipe, dtype):
    """As on the CPU: outputs are the joined layer's, gradients close to those of single layers."""
    model = Block().to(dtype).cuda()
    plain = convert(copy.deepcopy(model), recipe, kinds=False)
    fused = convert(model, recipe)
    x = models.data(64, dtype=dtype)[None].cuda()
    assert products(fused, x) == ([3, 2], 2)
    ours, theirs = models.step(fused, x), models.step(plain, x)
    for name, value in ours.items():
        error = (value.float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert float(error) < 2**-3, name


def test_siblings_in_float32_are_left_alone_on_a_gpu():
    """Their parts would be copied together first; inside autocast they are not."""
    fused = convert(Block().cuda(), "tensorwise")
    x = models.data(64, dtype=torch.float32)[None].cuda()
    assert products(fused, x) == ([], 7)
    with torch.autocast("cuda", torch.bfloat16):
        assert products(fused, x) == ([3, 2], 2)
