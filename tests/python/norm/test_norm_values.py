"""rms_norm, layer_norm and add_rms_norm: bits, bounds, and independence of rows."""

from __future__ import annotations

import norm_reference as reference
import pytest
import torch
from inputs import make
from norm_reference import DTYPES, FORMS, LAYER
from reference import assert_same_bits

import fp8

OPS = torch.ops.fp8
NUMBERS = {form: i for i, form in enumerate((*FORMS, LAYER))}
# Threads of a row from 1 to 512, whole eights and not, and rows that do not fit into registers.
SHAPES = (
    (3, 1),
    (7, 8),
    (5, 37),
    (300, 128),
    (9, 200),
    (11, 1000),
    (65, 2048),
    (6, 5121),
    (3, 9000),
)
LONG = ((3, 16384), (2, 16392), (2, 40_003))


def tensors(rows, cols, dtype, kind="normal", device="cpu"):
    x, residual, dy = (make(kind, (rows, cols), dtype, device) for _ in range(3))
    weight, bias = (torch.randn(cols).to(dtype).to(device) for _ in range(2))
    return x, residual, dy, weight, bias


def run(name, x, residual, weight, bias, eps=1e-6):
    return OPS._norm_forward(x, residual, weight, bias, eps, NUMBERS[name])


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG])
def test_norm_has_the_bits_of_its_formula(device, shape, dtype, form):
    x, residual, dy, weight, bias = tensors(*shape, dtype, device=device)
    bias = bias if form == LAYER else None
    y, _, mean, rstd = run(form, x, None, weight, bias)
    # On the CPU: torch divides by a number as it multiplies by its inverse on a GPU.
    host = [None if t is None else t.cpu() for t in (dy, x, weight, bias)]
    expected = reference.forward(*host[1:3], 1e-6, form, host[3])
    assert_same_bits(rstd, expected.rstd[:, 0], "rstd")
    assert_same_bits(y, expected.y, "y")
    grads = reference.backward(*host[:2], expected, host[2], form)
    saved = (x, mean if form == LAYER else None, rstd, weight)
    options = (weight.dtype, NUMBERS[form], True, True, form == LAYER)
    dx, dweight, dbias = OPS._norm_backward(dy, *saved, None, *options)
    assert_same_bits(dx, grads.dx, "dx")
    reference.assert_sum_over_rows(dweight.cpu(), grads.weight_terms, "dweight")
    if form == LAYER:
        reference.assert_sum_over_rows(dbias.cpu(), grads.dy, "dbias")
    joined = OPS._norm_backward(dy, *saved, residual, *options)[0]
    assert_same_bits(joined, (residual.float() + dx.float()).to(dtype), "dx with a residual's")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 200), (33, 2048), (2, 16392)])
def test_add_rms_norm_is_the_norm_of_the_sum(device, shape, dtype, form):
    x, residual, _, weight, _ = tensors(*shape, dtype, device=device)
    y, total = OPS.add_rms_norm(x, residual, weight, 1e-5, form)
    assert_same_bits(total, x + residual, "sum")
    assert_same_bits(y, OPS.rms_norm(x + residual, weight, 1e-5, form), "y")


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("kind", ["normal", "student_t", "lognormal", "tiny", "zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_within_its_bound_of_fp64(device, dtype, kind, form):
    x, _, _, weight, bias = tensors(20, 1100, dtype, kind, device)
    bias = bias if form == LAYER else None
    y = run(form, x, None, weight, bias)[0]
    exact = reference.exact(x, weight, 1e-6, form, bias)
    size = reference.exact(x, weight, 1e-6, form).abs()
    bound = reference.values_bound(x, exact, form, bias, size, weight)
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_eagers_bits_where_the_sums_are_equal(dtype, form):
    x, _, _, weight, _ = tensors(400, 768, dtype)
    scale = 10.0 ** torch.linspace(-4, 2, len(x))[:, None]
    x = (x.float() * scale).to(dtype)
    mean = x.float().pow(2).mean(-1, keepdim=True)
    eager_rstd = torch.rsqrt(mean + 1e-6)[:, 0]
    rstd = run(form, x, None, weight, None)[3]
    equal = rstd == eager_rstd
    assert int(equal.sum()) > 40
    assert bool(((rstd - eager_rstd).abs() <= 768 * 2**-24 * rstd).all())
    y, eager = OPS.rms_norm(x, weight, 1e-6, form), reference.eager(x, weight, 1e-6, form)
    assert_same_bits(y[equal], eager[equal], "rows of equal sums")
    if dtype != torch.float32:
        assert float((y == eager).float().mean()) > 0.99


@pytest.mark.parametrize("form", [*FORMS, LAYER])
@pytest.mark.parametrize("cols", [128, 1000, 4096])
def test_a_rows_results_do_not_depend_on_the_others(device, cols, form):
    x, residual, dy, weight, _ = tensors(700, cols, torch.bfloat16, device=device)
    y, _, mean, rstd = run(form, x, None, weight, None)
    options = (None, NUMBERS[form], True, True, False)

    def gradient(rows):
        of_rows = mean[rows] if form == LAYER else None
        saved = (x[rows], of_rows, rstd[rows], weight, residual[rows])
        return OPS._norm_backward(dy[rows], *saved, *options)[0]

    dx = gradient(slice(None))
    for rows in (slice(0, 1), slice(5, 8), slice(100, 357)):
        assert_same_bits(run(form, x[rows], None, weight, None)[0], y[rows], "y")
        assert_same_bits(gradient(rows), dx[rows], "dx")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_mixed_dtypes_gives_what_eager_gives(device, dtype, weight_dtype, form):
    x, _, dy, weight, _ = tensors(30, 300, dtype, device=device)
    leaves = [x.requires_grad_(), weight.to(weight_dtype).requires_grad_()]
    y, eager = OPS.rms_norm(*leaves, 1e-6, form), reference.eager(*leaves, 1e-6, form)
    assert y.dtype == eager.dtype
    torch.testing.assert_close(y, eager, rtol=0.01, atol=1e-6)
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    expected = torch.autograd.grad(eager, leaves, dy.to(y.dtype))
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.dtype == theirs.dtype
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01 * largest)


def test_default_eps_is_that_of_torch(device):
    for dtype in DTYPES:
        x = torch.full((2, 16), 1e-4, dtype=dtype, device=device)
        torch.testing.assert_close(fp8.ops.rms_norm(x), torch.nn.functional.rms_norm(x, (16,)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", [*FORMS, LAYER])
def test_what_is_not_finite_stays_in_its_row(device, form, bad):
    x, _, _, weight, _ = tensors(4, 256, torch.bfloat16, device=device)
    clean = run(form, x, None, weight, None)[0]
    x[2, 17] = bad
    y = run(form, x, None, weight, None)[0]
    assert bool(y[2].isnan().any())
    keep = [0, 1, 3]
    assert_same_bits(y[keep], clean[keep], "other rows")
