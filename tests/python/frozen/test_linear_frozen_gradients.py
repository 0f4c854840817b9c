"""linear_frozen's gradients: dx of the forward's own codes, the bias's, and what has none."""

from __future__ import annotations

import pytest
import torch
from frozen_reference import DTYPES, FORMS, GRANULARITIES, SHAPES, dequantized, problem
from reference import assert_same_bits
from torch import Tensor

import fp8

LEAST_DB = {"tensorwise": 29.0, "rowwise": 29.0, "blockwise": 29.0}


def snr(actual: Tensor, exact: Tensor) -> float:
    return float(20 * torch.log10(exact.norm() / (actual.double() - exact).norm()))


def step(p, *, bias: bool = True, dy: Tensor | None = None, **options):
    x = p.x.detach().requires_grad_()
    b = p.bias.detach().requires_grad_() if bias and p.bias is not None else None
    y = fp8.ops.linear_frozen(x, p.codes, p.scale, b, **options)
    dy = torch.randn(y.shape, device=y.device).to(y.dtype) if dy is None else dy
    y.backward(dy)
    return dy, x.grad, None if b is None else b.grad


@pytest.mark.parametrize(("of_weight", "of_x"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_input_gradient(device, of_weight, of_x, dtype, poisoned_memory):
    for shape in SHAPES:
        p = problem(shape, of_weight, dtype, bias=True, device=device)
        dy, dx, db = step(p, input_granularity=of_x)
        assert dx.dtype == dtype
        assert dx.shape == p.x.shape
        exact = dy.double() @ dequantized(p.codes, p.scale)
        if exact.numel() and shape[2] > 16:
            assert snr(dx, exact) > LEAST_DB[of_weight], shape
        rows = dy.reshape(-1, dy.shape[-1])
        assert torch.allclose(db.float(), rows.float().sum(0), rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_input_gradient_is_that_of_what_was_quantized(device, granularity):
    """dy whose values e4m3 has: dx is exact up to its rounding, so scales and codes are those of
    the forward, each in its place."""
    p = problem(((24,), 272, 144), granularity, torch.float32, device=device, power_of_two=True)
    # One size in each row and block: quantized without an error, also times a power of two.
    dy = torch.randint(0, 2, (24, 144), device=device).float() * 2 - 1
    if granularity == "rowwise":
        dy = dy / p.scale.reshape(1, -1)
    _, dx, _ = step(p, dy=dy)
    exact = dy.double() @ dequantized(p.codes, p.scale)
    size = dy.double().abs() @ dequantized(p.codes, p.scale).abs()
    assert bool(((dx.double() - exact).abs() <= 2.0**-9 * size).all())
    assert snr(dx, exact) > 60


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_gradient_of_small_fp16(device, granularity):
    """Scales are small numbers: dy times them would vanish in fp16."""
    p = problem(((24,), 272, 144), granularity, torch.float16, device=device)
    p.scale *= 2.0**-10
    dy = (torch.randn(24, 144, device=device) * 2.0**-10).half()
    x = p.x.clone().requires_grad_()
    y = fp8.ops.linear_frozen(x, p.codes, p.scale)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = dy.double() @ dequantized(p.codes, p.scale)
    assert bool((dx.double() - exact).abs().max() <= 2.0**-24 + 0.2 * exact.abs().max())
    assert float(dx.double().norm()) > 0.5 * float(exact.norm())


def test_frozen_saves_nothing_of_x():
    p = problem(((64,), 128, 32), "rowwise")
    x = p.x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8.ops.linear_frozen(x, p.codes, p.scale)
    assert {t.data_ptr() for t in saved} == {p.codes.data_ptr(), p.scale.data_ptr()}
    saved.clear()
    bias = torch.zeros(32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8.ops.linear_frozen(x.detach(), p.codes, p.scale, bias)
    assert saved == []


def test_frozen_gradients_that_are_asked_for(device):
    p = problem(SHAPES[0], "rowwise", bias=True, device=device)
    x, bias = p.x.requires_grad_(), p.bias.requires_grad_()
    y = fp8.ops.linear_frozen(x, p.codes, p.scale, bias)
    dy = torch.randn_like(y)
    (alone,) = torch.autograd.grad(y, bias, dy, retain_graph=True)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    both = torch.autograd.grad(y, (x, bias), dy)
    assert_same_bits(both[0], dx)
    assert_same_bits(both[1], alone)
    with torch.no_grad():
        assert not fp8.ops.linear_frozen(x, p.codes, p.scale, bias).requires_grad


def test_frozen_backward_notices_a_changed_weight():
    p = problem(SHAPES[0], "rowwise")
    y = fp8.ops.linear_frozen(p.x.requires_grad_(), p.codes, p.scale)
    p.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_frozen_errors_of_gradients(device):
    p = problem(SHAPES[0], "rowwise", device=device)
    scale = p.scale.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"fp8::linear_frozen: .*without requires_grad"):
        fp8.ops.linear_frozen(p.x, p.codes, scale)
    with torch.no_grad():
        fp8.ops.linear_frozen(p.x, p.codes, scale)
    x = p.x.clone().requires_grad_()
    y = fp8.ops.linear_frozen(x, p.codes, p.scale)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p.x.float(), torch.ones_like(p.x.float()))
        with pytest.raises(NotImplementedError, match="reverse mode"):
            fp8.ops.linear_frozen(dual, p.codes, p.scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_compiles(granularity):
    p = problem(SHAPES[1], granularity, torch.float32, bias=True)

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return (fp8.ops.linear_frozen(x, p.codes, p.scale, bias) ** 2).sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x, bias = p.x.clone().requires_grad_(), p.bias.clone().requires_grad_()
        value = function(x, bias)
        results.append((value, *torch.autograd.grad(value, (x, bias))))
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)
