"""merged_linear: the bits of one fused_linear on weights that were copied together, and what it has
in common with layers of their own."""

from __future__ import annotations

import merged_reference as reference
import pytest
import torch
from merged_reference import GW_HP, RECIPES, problem
from reference import assert_same_bits

import fp8
from fp8.ops import make_history

SHAPES = {
    "q, k, v": ((32,), 64, (48, 16, 16)),
    "odd": ((3, 7), 33, (7, 9)),
    "no tokens": ((0,), 16, (8, 8)),
    "an empty weight": ((5,), 32, (16, 0, 8)),
    "one weight": ((5,), 32, (16,)),
    "one token": ((), 48, (16, 8)),
    "more than are read where they lie": ((9,), 32, (8, 16, 8, 24, 8)),
    "blocks that straddle": ((130,), 136, (64, 200)),
}
OPTIONS = [*RECIPES, "rowwise:power_of_two", "tensorwise:power_of_two"]


def assert_same_steps(ours, theirs, recipe, exact_dweight=True) -> None:
    for i, (y, expected) in enumerate(zip(ours.ys, theirs.ys, strict=True)):
        assert_same_bits(y.contiguous(), expected.contiguous(), f"y {i}")
    assert_same_bits(ours.dx, theirs.dx, "dx")
    for i, (dw, expected) in enumerate(zip(ours.dweights, theirs.dweights, strict=True)):
        if exact_dweight or recipe.partition(":")[0] not in GW_HP:
            assert_same_bits(dw, expected.contiguous(), f"dweight {i}")
        else:  # a product for each, whose sums may have another order
            torch.testing.assert_close(dw, expected, rtol=2**-8, atol=2**-8)
    for i, (db, expected) in enumerate(zip(ours.dbiases, theirs.dbiases, strict=True)):
        assert (db is None) == (expected is None)
        if db is not None:
            assert_same_bits(db, expected.contiguous(), f"dbias {i}")


@pytest.mark.parametrize("recipe", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biases", ["none", "all", "some"])
def test_merged_is_the_joined_layer(device, recipe, shape, biases):
    size, k, rows = SHAPES[shape]
    biased = {"none": (), "all": (True,) * len(rows), "some": (True, False) * 3}[biases]
    for dtype in (torch.bfloat16, torch.float32):
        p = problem(size, k, rows, dtype, biased[: len(rows)], device)
        theirs = reference.joined(p, recipe)
        assert_same_steps(reference.merged(p, recipe), theirs, recipe, exact_dweight=False)


@pytest.mark.parametrize("biases", [(), (True, True)])
def test_merged_delayed_moves_one_history(device, biases):
    ours, theirs = make_history(device), make_history(device)
    for step in range(20):  # past the window
        p = problem((17,), 32, (16, 8), biased=biases, device=device)
        p.x *= 1 + step % 3
        made = reference.merged(p, "delayed", history=ours)
        assert_same_steps(made, reference.joined(p, "delayed", history=theirs), "delayed")
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp"])
def test_merged_rowwise_forward_is_that_of_separate_layers(device, recipe):
    p = problem((40,), 64, (48, 16, 32), biased=(True, False, True), device=device)
    ours, theirs = reference.merged(p, recipe), reference.separate(p, recipe)
    for y, expected in zip(ours.ys, theirs.ys, strict=True):
        assert_same_bits(y.contiguous(), expected)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise"])
def test_merged_of_equal_amaxes_is_separate_layers(device, recipe):
    """Where the parts have one amax anyway, scales are those of separate layers; dx is rounded once
    where theirs are rounded twice and added."""
    p = problem((24,), 32, (16, 8), torch.float32, device=device)
    for tensors in (p.weights, p.dys):
        for t in tensors:
            t /= t.abs().max()
            t.view(-1)[5] = 1.0
    ours, theirs = reference.merged(p, recipe), reference.separate(p, recipe)
    for y, expected in zip(ours.ys, theirs.ys, strict=True):
        assert_same_bits(y.contiguous(), expected)
    if recipe != "rowwise":  # its gradients share the scales of rows
        for dw, expected in zip(ours.dweights, theirs.dweights, strict=True):
            assert_same_bits(dw, expected)
        # Sums of the same products in another order: 24 terms of at most 1, each rounded to fp32,
        # on a GPU to the 14 bits of a tensor core.
        rounding = 2.0**-13 if torch.device(device).type == "cuda" else 2.0**-20
        torch.testing.assert_close(ours.dx, theirs.dx, rtol=0, atol=24 * rounding)


def test_merged_joint_scale_costs_a_bounded_error(device):
    """One scale of the largest amax: an element of a part that is r times smaller is rounded to
    steps that are relative, 2^-4 of it for e4m3's normal numbers, or, below 2^-6 of 448ths of the
    joint amax, 2^-10 of that. So y is off by no more than that of every product."""
    p = problem((64,), 128, (32, 32), torch.float32, device=device)
    p.weights[0] = p.weights[0] / p.weights[0].abs().max()
    p.weights[1] = 100 * p.weights[1] / p.weights[1].abs().max()
    exact = [p.x.double() @ w.double().t() for w in p.weights]
    for y, expected, weight in zip(
        reference.merged(p, "tensorwise").ys, exact, p.weights, strict=True
    ):
        joint, amax_x = 100.0, float(p.x.abs().max())

        def rounding(t, amax):
            return t.double().abs() * 2.0**-4 + amax / 448 * 2.0**-10

        dx, dw = rounding(p.x, amax_x), rounding(weight, joint)
        x, w = p.x.double().abs(), weight.double().abs()
        products = dx @ w.t() + x @ dw.t() + dx @ dw.t()
        sums = (x + dx) @ (w + dw).t() * 2.0**-7  # of tensor cores that accumulate fast
        assert bool(((y.double() - expected).abs() <= products + sums).all())


def test_merged_non_finite_values_are_not_hidden(device):
    p = problem((16,), 32, (16, 8), device=device)
    p.weights[1][0, 0] = float("inf")
    y, other = fp8.ops.merged_linear(p.x, p.weights)
    assert not y.isfinite().any()  # they share the scale
    assert not other.isfinite().any()
    y, other = fp8.ops.merged_linear(p.x, p.weights, None, "rowwise")
    assert bool(y.isfinite().all())
    assert not other[:, 0].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merged_strided_arguments(device, dtype):
    """Weights that are slices, and gradients as attention leaves them: [B, H, S, D] turned."""
    big = torch.randn(80, 96, device=device).to(dtype)
    weights = [big[:32, 16:80], big[32:48, 16:80].clone(), big[48:64, :64]]
    x = torch.randn(2, 6, 96, device=device).to(dtype)[..., 32:].requires_grad_()
    leaves = [w.detach().requires_grad_() for w in weights]
    results = []
    for copies in (False, True):
        given = [w.contiguous() if copies else w for w in leaves]
        ys = fp8.ops.merged_linear(x, given, None, "tensorwise")
        heads = [y.view(2, 6, -1, 16).transpose(1, 2) for y in ys]
        grads = torch.autograd.grad(sum(h.sin().sum() for h in heads), [x, *leaves])
        results.append([*(y.detach() for y in ys), *grads])
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours.contiguous(), theirs.contiguous())


def test_merged_autocast(device):
    p = problem((24,), 32, (16, 8), torch.float32, (True, False), device)
    x, weights = p.x.requires_grad_(), [w.requires_grad_() for w in p.weights]
    with torch.autocast(device, torch.bfloat16):
        ys = fp8.ops.merged_linear(x, weights, p.biases)
    low = [None if b is None else b.bfloat16() for b in p.biases]
    expected = fp8.ops.merged_linear(x.bfloat16(), [w.bfloat16() for w in weights], low)
    for y, theirs in zip(ys, expected, strict=True):
        assert y.dtype == torch.bfloat16
        assert_same_bits(y.contiguous(), theirs.contiguous())
    grads = torch.autograd.grad(sum(y.float().sum() for y in ys), [x, *weights])
    assert all(g.dtype == torch.float32 for g in grads)
