"""Gradients of the norms: against autograd of eager code, what is asked for, what is saved."""

from __future__ import annotations

import norm_reference as reference
import pytest
import torch
from norm_reference import DTYPES, FORMS, LAYER
from reference import assert_same_bits
from torch.utils.checkpoint import checkpoint

import fp8

OPS = torch.ops.fp8
EVERY = (*FORMS, LAYER)


def call(form, x, weight, bias=None):
    if form == LAYER:
        return fp8.ops.layer_norm(x, weight, bias, 1e-6)
    return fp8.ops.rms_norm(x, weight, 1e-6, form)


def leaves(shape, dtype, form, device="cpu"):
    shapes = (shape, shape[-1:], shape[-1:]) if form == LAYER else (shape, shape[-1:])
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 5, 96), (257, 1030)])
def test_gradients_are_eagers(device, shape, dtype, form):
    """Eager autograd rounds where the operator does, so that they differ by the order of sums, a
    step of the format here and there."""
    inputs = leaves(shape, dtype, form, device)
    dy = torch.randn(shape, device=device).to(dtype)
    ours = torch.autograd.grad(call(form, *inputs), inputs, dy)
    if form == LAYER:  # torch's on the CPU sums in bfloat16 partly
        wide = [t.detach().float().requires_grad_() for t in inputs]
        eager = reference.eager(wide[0], wide[1], 1e-6, form, wide[2])
        theirs = [g.to(dtype) for g in torch.autograd.grad(eager, wide, dy.float())]
    else:
        eager = reference.eager(inputs[0], inputs[1], 1e-6, form)
        theirs = torch.autograd.grad(eager, inputs, dy)
    step = max(torch.finfo(dtype).eps, 2**-18)  # in fp32 sums differ by more than a step
    for got, expected, leaf in zip(ours, theirs, inputs, strict=True):
        assert (got.dtype, got.shape) == (leaf.dtype, leaf.shape)
        largest = float(expected.float().abs().max())
        torch.testing.assert_close(got, expected, rtol=2 * step, atol=step * largest / 4 + 1e-5)


@pytest.mark.parametrize("form", EVERY)
def test_gradients_are_no_worse_than_eagers_against_fp64(form):
    inputs = leaves((64, 768), torch.bfloat16, form)
    dy = torch.randn(64, 768).bfloat16()
    ours = torch.autograd.grad(call(form, *inputs), inputs, dy)
    eager = reference.eager(inputs[0], inputs[1], 1e-6, form, *inputs[2:])
    theirs = torch.autograd.grad(eager, inputs, dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact_y = reference.exact(wide[0], wide[1], 1e-6, form, *wide[2:])
    exact = torch.autograd.grad(exact_y, wide, dy.double())
    for got, eagers, true in zip(ours, theirs, exact, strict=True):
        error, eager_error = ((t.double() - true).norm() for t in (got, eagers))
        assert float(error) <= 1.02 * float(eager_error)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_adds_both_gradients(device, dtype, form):
    """dx = T(dsum + T(dnorm)) for both inputs, and each part alone."""
    x, residual = (torch.randn(9, 200, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(200, device=device).to(dtype).requires_grad_()
    dy, dsum = (torch.randn(9, 200, device=device).to(dtype) for _ in range(2))
    y, total = fp8.ops.add_rms_norm(x, residual, weight, 1e-6, form)
    normed = (x.detach() + residual.detach()).requires_grad_()
    alone = torch.autograd.grad(call(form, normed, weight), [normed, weight], dy)

    grads = torch.autograd.grad([y, total], [x, residual, weight], [dy, dsum], retain_graph=True)
    assert_same_bits(grads[0], dsum + alone[0], "dx")
    assert_same_bits(grads[1], dsum + alone[0], "dresidual")
    assert_same_bits(grads[2], alone[1], "dweight")
    of_y = torch.autograd.grad(y, [x, residual], dy, retain_graph=True)
    assert_same_bits(of_y[0], alone[0], "dx of y")
    of_sum = torch.autograd.grad(total, [x, residual], dsum, retain_graph=True)
    assert_same_bits(of_sum[1], dsum, "dresidual of the sum")
    assert torch.autograd.grad(total, weight, dsum, allow_unused=True) == (None,)


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_only_what_is_asked_for(device, form, wanted):
    """Frozen inputs, and torch.autograd.grad of a part."""
    inputs = leaves((20, 72), torch.bfloat16, form, device)
    dy = torch.randn_like(inputs[0])
    every = torch.autograd.grad(call(form, *inputs), inputs, dy)
    part = torch.autograd.grad(call(form, *inputs), [inputs[i] for i in wanted], dy)
    frozen = [t if i in wanted else t.detach() for i, t in enumerate(inputs)]
    rest = torch.autograd.grad(call(form, *frozen), [inputs[i] for i in wanted], dy)
    for i, a, b in zip(wanted, part, rest, strict=True):
        assert_same_bits(a, every[i], f"part {i}")
        assert_same_bits(b, every[i], f"others frozen, {i}")


def test_layer_norm_with_any_of_its_parameters(device):
    x, weight, bias = leaves((30, 100), torch.float32, LAYER, device)
    dy = torch.randn_like(x)
    for w, b in ((weight, None), (None, bias), (None, None)):
        inputs = [t for t in (x, w, b) if t is not None]
        ours = torch.autograd.grad(fp8.ops.layer_norm(x, w, b), inputs, dy)
        theirs = torch.nn.functional.layer_norm(x, (100,), w, b)
        for got, expected in zip(ours, torch.autograd.grad(theirs, inputs, dy), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(device, form, reentrant):
    inputs = leaves((6, 40), torch.bfloat16, form, device)
    run = lambda *args: call(form, *args)  # noqa: E731
    expected = torch.autograd.grad(run(*inputs).sum(), inputs)
    checkpoint(run, *inputs, use_reentrant=reentrant).sum().backward()
    for leaf, grad in zip(inputs, expected, strict=True):
        assert_same_bits(leaf.grad, grad, "checkpointed")


@pytest.mark.parametrize("form", EVERY)
def test_double_backward_is_refused(form):
    inputs = leaves((6, 40), torch.float32, form)
    (dx,) = torch.autograd.grad(call(form, *inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()


def test_forward_mode_is_refused():
    x = torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match=r"fp8::rms_norm.*forward-mode"):
        torch.func.jvp(lambda t: OPS.rms_norm(t), (x,), (x,))


@pytest.mark.parametrize("form", EVERY)
def test_what_is_normed_must_not_change(form):
    inputs = leaves((6, 40), torch.float32, form)
    x = inputs[0] * 1
    y = call(form, x, *inputs[1:])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("form", EVERY)
def test_vmap_and_compile(form):
    inputs = leaves((5, 6, 40), torch.float32, form)
    x, parameters = inputs[0], inputs[1:]
    mapped = torch.vmap(lambda t: call(form, t, *parameters))(x)
    assert_same_bits(mapped, call(form, *inputs), "vmap")
    dy = torch.randn_like(x)
    expected = torch.autograd.grad(call(form, *inputs), inputs, dy)
    compiled = torch.compile(lambda *t: call(form, *t), backend="aot_eager", fullgraph=True)
    for got, grad in zip(torch.autograd.grad(compiled(*inputs), inputs, dy), expected, strict=True):
        assert_same_bits(got, grad, "compiled")


def test_autocast_is_torchs():
    """On the CPU both norms take what they get; on a GPU LayerNorm computes in fp32."""
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert OPS.layer_norm(x).dtype == torch.nn.functional.layer_norm(x, (16,)).dtype
        assert OPS.rms_norm(x.float()).dtype == torch.float32
        assert OPS.rms_norm(x).dtype == torch.bfloat16
