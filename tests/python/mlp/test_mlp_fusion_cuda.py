"""Fused MLPs of fp8.convert on a GPU: the module's bits, autocast, graphs, models moved there."""

from __future__ import annotations

import mlp_models as models
import pytest
import torch
from mlp_models import assert_same_step, data, nodes, pair
from reference import assert_same_bits
from torch import nn

import fp8

pytestmark = pytest.mark.gpu

FORMS = {
    "gated": models.Gated,
    "merged": models.Merged,
    "gate second": models.MergedSecond,
    "plain": models.Plain,
}


def moved(module, *args, **kwargs):
    """Fused on the CPU, and moved: what was recognized holds there."""
    return tuple(m.cuda() for m in pair(module, *args, **kwargs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mlp_is_itself_on_a_gpu(form, activation, dtype):
    fused, plain = moved(FORMS[form](models.ACTIVATIONS[activation]()), dtype=dtype)
    x = data(dtype, 3, 100).cuda()
    assert_same_step(fused, plain, x, two=form == "gated")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_mlp_recipes_on_a_gpu(form, recipe):
    fused, plain = moved(FORMS[form](bias=True), recipe)
    for scale in (1.0, 3.0, 0.5):
        x = scale * data(torch.bfloat16, 300).cuda()
        assert_same_step(fused, plain, x, two=form == "gated")


@pytest.mark.parametrize("form", FORMS)
def test_mlp_autocast_on_a_gpu(form):
    fused, plain = moved(FORMS[form](nn.SiLU()), dtype=torch.float32)
    x = data(torch.float32, 64).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert_same_step(fused, plain, x, two=form == "gated")


def test_mlp_clamped_on_a_gpu():
    fused, plain = moved(models.Clamped())
    assert_same_step(fused, plain, 3 * data(torch.bfloat16, 100).cuda(), two=True)


def test_mlp_found_on_a_gpu_touches_nothing_there():
    module = models.Gated().cuda().bfloat16()
    state, before = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    models.fuse(module)
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert nodes(module, data().cuda()) == 1


def test_mlp_in_a_cuda_graph():
    """Captured in a mode in which it was not called before: asking is the CPU's."""
    fused, _ = moved(models.Gated(nn.SiLU()))
    x = data(torch.bfloat16, 64).cuda()
    with torch.no_grad():
        expected = fused(x)
        fused.eval()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(x)
        graph.replay()
    assert_same_bits(y, expected)


def test_mlp_does_not_wait_for_the_gpu():
    fused, _ = moved(models.Gated(nn.SiLU()))
    x = data(torch.bfloat16, 64).cuda()
    models.step(fused, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_mlp_compiled_by_inductor():
    fused, _ = moved(models.Gated(nn.SiLU()))
    x = data(torch.bfloat16, 64).cuda()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True)
    assert_same_bits(compiled(x).detach(), fused(x).detach())
