"""moe_experts' backward overwrites the first product that it saved, and gives its memory back, only
where nobody can look at it again."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_bits
from test_moe_experts import problem
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

OPS = torch.ops.fp8
RECIPES = ("rowwise", "rowwise_gw_hp", "blockwise")


def forward(device, recipe="rowwise", **sizes):
    """y and its leaves."""
    x, index, weights, gate_up, down, *_ = problem(device=device, **sizes)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    return OPS.moe_experts(x, index, weights, gate_up, down, recipe=recipe), leaves


def gradients(y, leaves, **options):
    return torch.autograd.grad(y, leaves, torch.ones_like(y), **options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_moe_backward_twice_with_a_graph_that_is_kept(device, recipe):
    y, leaves = forward(device, recipe)
    first = gradients(y, leaves, retain_graph=True)
    second = gradients(y, leaves, retain_graph=True)
    last = gradients(y, leaves)
    for a, b, c in zip(first, second, last, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(y, leaves)


def test_moe_backward_leaves_what_hooks_keep(device):
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y, leaves = forward(device)
    before = [tensor.clone() for tensor in kept]
    gradients(y, leaves)
    assert len(kept) >= 8
    for tensor, copy in zip(kept, before, strict=True):
        assert_same_bits(tensor.detach(), copy.detach())


def test_moe_backward_leaves_what_a_mode_sees(device):
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_moe_backward" in str(func):
                seen.extend(a for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    y, leaves = forward(device)
    with Record():
        gradients(y, leaves)
    assert len(seen) >= 9
    assert all(tensor.untyped_storage().nbytes() > 0 for tensor in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_moe_backward_memory(recipe):
    """The product and its gradient lie in one place, and in none beside the weight gradients."""
    sizes = {"tokens": 2048, "hidden": 256, "features": 2048, "experts": 4}
    product = 2048 * 2 * 2 * 2048 * 2  # rows, gates and ups, bf16

    def peak(kept: bool) -> int:
        y, leaves = forward("cuda", recipe, **sizes)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        gradients(y, leaves, retain_graph=kept)
        return torch.cuda.max_memory_allocated()

    peak(kept=True)
    assert peak(kept=True) - peak(kept=False) >= 0.9 * product


@pytest.mark.gpu
def test_moe_backward_memory_is_not_used_while_it_is_read():
    """What takes the product's place is allocated while the GPU is still at work."""
    sizes = {"tokens": 4096, "hidden": 512, "features": 1024, "experts": 8}
    expected = None
    for _ in range(5):
        torch.manual_seed(5)
        y, leaves = forward("cuda", **sizes)
        found = gradients(y, leaves)
        others = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(8)]
        expected = expected or [tensor.clone() for tensor in found]
        del others
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(a, b)
