"""What autograd, transformations and torch.compile make of rope."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_bits
from rope_reference import BF16, FORMS, FP32, SHAPES, eager, problem
from torch.utils.checkpoint import checkpoint

import fp8


def made(device, dtypes=(BF16, BF16)):
    return problem(SHAPES[0], dtypes, False, device)


@pytest.mark.parametrize("wanted", ["q", "k", "both", "neither"])
def test_rope_makes_the_gradients_that_are_asked_for(device, wanted):
    q, k, cos, sin = made(device)
    q.requires_grad_(wanted in ("q", "both"))
    k.requires_grad_(wanted in ("k", "both"))
    results = fp8.ops.rope(q, k, cos, sin)
    leaves = [x for x in (q, k) if x.requires_grad]
    assert all(y.requires_grad == bool(leaves) for y in results)
    if not leaves:
        return
    grads = [torch.randn_like(y) for y in results]
    ours = torch.autograd.grad(results, leaves, grads)
    both = [x.detach().requires_grad_() for x in (q, k)]
    expected = torch.autograd.grad(fp8.ops.rope(*both, cos, sin), both, grads)
    expected = [e for e, x in zip(expected, (q, k), strict=True) if x.requires_grad]
    for a, b in zip(ours, expected, strict=True):
        assert_same_bits(a, b, wanted)


@pytest.mark.parametrize("used", [0, 1])
def test_rope_where_one_result_is_not_used(device, used):
    q, k, cos, sin = made(device)
    leaves = [x.requires_grad_() for x in (q, k)]
    y = fp8.ops.rope(*leaves, cos, sin)[used]
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    assert ours[1 - used] is None
    x = leaves[used].detach().requires_grad_()
    theirs = torch.autograd.grad(eager(x, cos, sin, "halves", "each", 32), x, grad)
    assert_same_bits(ours[used], theirs[0], "gradient")


def test_rope_of_gradients_that_are_expanded(device):
    q, k, cos, sin = made(device)
    leaves = [x.requires_grad_() for x in (q, k)]
    ours = torch.autograd.grad(sum(y.sum() for y in fp8.ops.rope(*leaves, cos, sin)), leaves)
    ones = [torch.ones_like(x, memory_format=torch.contiguous_format) for x in leaves]
    theirs = torch.autograd.grad(fp8.ops.rope(*leaves, cos, sin), leaves, ones)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b, "gradient of a sum")


@pytest.mark.parametrize(("layout", "rounding"), FORMS)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32)])
def test_rope_gradient_of_a_gradient_is_the_rotation_again(device, layout, rounding, dtypes):
    """It is linear in q, so this depends on the gradient's gradient alone."""
    q, _, cos, sin = made(device, dtypes)
    dy, ddx = torch.randn(2, *q.shape, device=device).to(q.dtype)

    def second(rotate):
        leaf, grad = q.detach().requires_grad_(), dy.clone().requires_grad_()
        (first,) = torch.autograd.grad(rotate(leaf), leaf, grad, create_graph=True)
        return torch.autograd.grad(first, grad, ddx)[0]

    options = {"layout": layout, "rounding": rounding}
    ours = second(lambda x: fp8.ops.rope(x, None, cos, sin, **options)[0])
    theirs = second(lambda x: eager(x, cos, sin, layout, rounding, 32))
    assert_same_bits(ours, fp8.ops.rope(ddx, None, cos, sin, **options)[0], "second")
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_rope_within_checkpointing(device, reentrant):
    q, k, cos, sin = made(device)
    leaves = [x.requires_grad_() for x in (q, k)]

    def step(run):
        results = run(*leaves)
        return [*results, *torch.autograd.grad(sum((y * y).sum() for y in results), leaves)]

    def rope(q, k):
        return fp8.ops.rope(q, k, cos, sin)

    def again(q, k):
        return checkpoint(rope, q, k, use_reentrant=reentrant)

    if reentrant:  # which takes backward() alone
        sum((y * y).sum() for y in again(*leaves)).backward()
        ours = [x.grad for x in leaves]
        theirs = step(rope)[2:]
    else:
        ours, theirs = step(again), step(rope)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b, "checkpoint")


@pytest.mark.parametrize("dynamic", [False, True])
def test_rope_compiled(device, dynamic):
    def step(q, k, cos, sin):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = fp8.ops.rope(q, k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for positions in (5, 6, 9):
        shape = (2, 3, 2, positions, 32, 32)
        q, k, cos, sin = problem(shape, (BF16, BF16), False, device)
        leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k)]
        results, expected = compiled(*leaves, cos, sin), step(*leaves, cos, sin)
        grads = [torch.randn_like(y) for y in expected]
        ours = torch.autograd.grad(results, leaves, grads)
        theirs = torch.autograd.grad(expected, leaves, grads)
        for a, b in zip((*results, *ours), (*expected, *theirs), strict=True):
            assert_same_bits(a, b, "compiled")
            assert a.stride() == b.stride()


def test_rope_saves_the_angles_alone(device):
    q, k, cos, sin = made(device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8.ops.rope(q.requires_grad_(), k.requires_grad_(), cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


def test_rope_under_autocast_takes_tensors_as_they_are(device):
    q, k, cos, sin = made(device, (BF16, FP32))
    expected = fp8.ops.rope(q, k, cos, sin)
    with torch.autocast(device, BF16):
        for a, b in zip(fp8.ops.rope(q, k, cos, sin), expected, strict=True):
            assert_same_bits(a, b, "autocast")


def test_rope_mapped_by_vmap(device):
    q, k, cos, sin = made(device)

    def rope(q, k, cos, sin):
        return fp8.ops.rope(q, k, cos, sin)

    mapped = torch.vmap(rope)(q, k, cos, sin)
    for a, b in zip(mapped, rope(q, k, cos, sin), strict=True):
        assert_same_bits(a, b, "vmap")


def test_rope_of_tangents_is_refused():
    q, _, cos, sin = made("cpu", (FP32, FP32))
    with pytest.raises(NotImplementedError, match="fp8::rope: expected reverse mode"):
        torch.func.jvp(lambda x: fp8.ops.rope(x, None, cos, sin)[0], (q,), (q,))
