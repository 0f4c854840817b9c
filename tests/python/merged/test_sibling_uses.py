"""Fused siblings where training and inference take them: checkpointing, autocast, caches,
compilers, DDP."""

from __future__ import annotations

import copy
import os

import pytest
import sibling_models as models
import torch
from reference import assert_same_bits
from sibling_models import Attention, Block, assert_close_step, convert, data, pair, products
from test_sibling_safety import MergedHeads, Writes
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp8
from fp8.tools._autotune import _cases_of_model


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, reentrant: bool):
        super().__init__()
        self.block = block
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_siblings_recomputed(recipe, reentrant):
    fused, _ = pair(Block(), recipe)
    again = Checkpointed(copy.deepcopy(fused), reentrant)
    for scale in (1.0, 2.0):
        ours, theirs = models.step(again, scale * data()), models.step(fused, scale * data())
        for name, value in theirs.items():
            ours_name = name if name in ("y", "dx") else f"block.{name}"
            assert_same_bits(ours[ours_name], value, name)


@pytest.mark.parametrize("kind", [Writes, MergedHeads])
@pytest.mark.parametrize("first", [False, True])
def test_siblings_recomputed_as_they_were_computed(kind, first):
    """What a call shows is for those after it: a recomputation does what was done before, whatever
    was shown since."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = kind()

        def forward(self, x):
            return checkpoint(lambda x: self.inner(x.clone()), x, use_reentrant=False)

    fused, plain = pair(Twice())
    if not first:
        fused(data())
    ys = []
    for module in (fused, plain):
        x = data().requires_grad_()
        y = module(x)
        module(x)  # another forward before the backward
        y.sum().backward()
        ys.append((y.detach(), x.grad))
        module.zero_grad()
    assert_same_bits(ys[0][0], ys[1][0])
    assert_close_step(fused, plain, data())


@pytest.mark.parametrize("enabled", [False, True])
def test_siblings_autocast(enabled):
    fused, plain = pair(Block(), "rowwise", torch.float32)
    x = data(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert products(fused, x) == ([3, 2], 2)
        assert_same_bits(fused(x), plain(x))


def test_siblings_without_gradients():
    fused, plain = pair(Block())
    with torch.no_grad():
        assert products(fused, data()) == ([3, 2], 2)
        assert_same_bits(fused(data()), plain(data()))
    with torch.inference_mode():
        x = data()  # counts no writes: each layer by itself
        assert products(fused.attention, x) == ([], 4)
        assert_same_bits(fused(x), plain(x))


def test_siblings_in_cached_weights():
    fused, _ = pair(Block(), "tensorwise")
    expected = models.step(fused, data())
    with fp8.cached_weights(fused):
        for _ in range(2):
            for name, value in models.step(fused, data()).items():
                assert_same_bits(value, expected[name], name)


def test_siblings_compiled():
    """A compiler has them one by one, and no graph break."""
    fused, plain = pair(Block())
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(data()), plain(data()))
    assert products(fused, data()) == ([3, 2], 2)
    explicit = fp8.MergedLinear(32, {"q": 32, "k": 16}, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(explicit, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(compiled(data()), explicit(data()), strict=True):
        assert_same_bits(ours.contiguous(), theirs.contiguous())


def test_siblings_exported_and_traced():
    fused, plain = pair(Block(), dtype=torch.float32)
    x = data(dtype=torch.float32)
    expected = plain(x)
    assert_same_bits(torch.export.export(fused, (x,)).module()(x), expected)
    with torch.no_grad():
        traced = torch.jit.trace(fused, (x,))
        assert_same_bits(traced(2 * x), fused(2 * x))


@pytest.mark.parametrize("view", [False, True])
def test_siblings_in_ddp(view, tmp_path):
    """Buckets, and gradients as views of them; a layer that is not used is found."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        fused, _ = pair(Block(), "tensorwise")
        expected = models.step(fused, data())
        ddp = nn.parallel.DistributedDataParallel(
            fused, gradient_as_bucket_view=view, find_unused_parameters=True
        )
        for _ in range(2):
            x = data().requires_grad_()
            y = ddp(x)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
            y.backward(dy)
            for name, parameter in fused.named_parameters():
                assert_same_bits(parameter.grad, expected[name], name)
            fused.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


def test_siblings_under_two_parents_and_by_themselves():
    """Layers that two modules share, one of them alone."""

    class Shared(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.a, self.b = attention.a, attention.b
            self.inner = attention

        def forward(self, x):
            y = self.a(x)[..., :16] + self.b(x)
            return y + self.inner(x)[..., :16]

    fused, plain = pair(Shared(Attention()))
    assert products(fused, data()) == ([2, 3], 1)
    assert_close_step(fused, plain, data())
    assert_same_bits(fused.a(data()), plain.a(data()))
    assert products(fused.a, data()) == ([], 1)


def test_siblings_clip_and_accumulate():
    """Gradients that share memory: accumulated over micro-batches, clipped, dropped one by one."""
    fused, plain = pair(Block(), "rowwise", torch.float32)
    grads = []
    for module in (fused, plain):
        for scale in (1.0, -0.5):
            module(scale * data(dtype=torch.float32)).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        grads.append([norm, *(p.grad for p in module.parameters())])
        module.attention.a.weight.grad = None
    for ours, theirs in zip(*grads, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 2**-3


def test_siblings_of_more_than_four():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(32, 16) for _ in range(6))

        def forward(self, x):
            return self.a(x) + self.b(x) + self.c(x) + self.d(x) + self.e(x) + self.f(x)

    fused, plain = pair(Many())
    assert products(fused, data()) == ([4, 2], 0)
    assert_close_step(fused, plain, data())


def test_siblings_in_a_model_on_two_dtypes():
    model = convert(nn.ModuleList([Attention().bfloat16(), Attention().half()]))
    model[0].b.half()
    assert "a and b and c differ in dtype" in fp8.summary(model)
    assert products(model[1], data(dtype=torch.float16)) == ([3], 1)


def test_siblings_are_autotuned():
    """As one, and by themselves, as they are where something is in the way."""
    model = nn.ModuleList([convert(Block()), fp8.MergedLinear(32, [16, 8])])
    cases = _cases_of_model(model, [8])
    assert {(case.k, case.n, case.bias) for case in cases} >= {
        (32, 64, False),  # q, k, v
        (32, 96, True),  # gate, up
        (32, 24, True),
        (32, 48, True),
    }
    model[0].attention.b.register_forward_hook(lambda *_: None)
    assert (32, 64, False) not in {(c.k, c.n, c.bias) for c in _cases_of_model(model, [8])}
