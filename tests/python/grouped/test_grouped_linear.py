"""grouped_linear: every group against fp64, whatever the routing; layout, errors, determinism."""

from __future__ import annotations

import re

import grouped_reference as reference
import pytest
import torch
from grouped_reference import RECIPES, ROUTINGS, WITH_OPTIONS
from reference import FLOAT_DTYPES, assert_same_bits
from sample import POWER_OF_TWO, ROWWISE

import fp8

OPS = torch.ops.fp8


@pytest.mark.parametrize("recipe", WITH_OPTIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouped_linear_against_a_loop(device, routing, recipe, poisoned_memory):
    p = reference.problem(ROUTINGS[routing], 96, 80, device=device)
    reference.check_values(p, reference.run(p, recipe), recipe)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "blockwise"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_grouped_linear_dtypes(device, dtype, with_bias, recipe):
    p = reference.problem(ROUTINGS["random"], 64, 48, dtype, device)
    actual = reference.run(p, recipe, with_bias)
    reference.check_values(p, actual, recipe, with_bias)
    assert actual.y.dtype == actual.dx.dtype == actual.dw.dtype == dtype


@pytest.mark.parametrize(
    "recipe", ["rowwise", "rowwise_gw_hp", "rowwise:power_of_two", "blockwise"]
)
@pytest.mark.parametrize(("k", "n"), [(16, 16), (33, 65), (7, 3), (272, 144), (64, 20)])
def test_grouped_linear_extents(device, k, n, recipe, poisoned_memory):
    """Also those that are no multiples of 16."""
    for transposed in (False, True):
        p = reference.problem((19, 0, 50), k, n, device=device, transposed=transposed)
        reference.check_values(p, reference.run(p, recipe), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_grouped_linear_rows_past_the_last_offset(device, recipe, with_bias, poisoned_memory):
    """Zeros, and a gradient of zeros, also where they hold NaN."""
    p = reference.problem((20, 0, 31), 64, 48, device=device, spare=13)
    p.x[51:] = torch.nan
    p.dy[51:] = torch.nan
    actual = reference.run(p, recipe, with_bias)
    reference.check_values(p, actual, recipe, with_bias)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "blockwise"])
def test_grouped_linear_weights_stored_transposed(device, recipe):
    """The same numbers, and the gradient is stored as the weight is."""
    p = reference.problem(ROUTINGS["random"], 64, 48, device=device)
    transposed = p._replace(weight=p.weight.transpose(1, 2).contiguous().transpose(1, 2))
    ours, theirs = reference.run(transposed, recipe), reference.run(p, recipe)
    assert ours.dw.stride() == transposed.weight.stride()
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        if device == "cuda" and name == "dw":  # operands change places in the kernel
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
        else:
            assert_same_bits(a, b, name)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "blockwise"])
@pytest.mark.parametrize(
    ("counts", "k", "n"),
    [((0, 0), 32, 16), ((3, 4), 0, 16), ((3, 4), 32, 0), ((), 32, 16)],
    ids=str,
)
def test_grouped_linear_without_elements(device, counts, k, n, recipe):
    rows, groups = sum(counts), len(counts)
    x = torch.randn(rows, k, device=device, requires_grad=True)
    weight = torch.randn(groups, n, k, device=device, requires_grad=True)
    bias = torch.randn(groups, n, device=device, requires_grad=True)
    offsets = torch.tensor(counts, device=device, dtype=torch.long).cumsum(0).int()
    y = OPS.grouped_linear(x, weight, offsets, bias, recipe)
    y.sum().backward()
    ends = reference.slices(offsets)
    expected = torch.cat([bias[g].expand(r.stop - r.start, n) for g, r in enumerate(ends)] or [y])
    torch.testing.assert_close(y, expected)
    assert not x.grad.any()
    assert not weight.grad.any()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("recipe", RECIPES)
def test_grouped_linear_strided_rows(device, recipe):
    p = reference.problem(ROUTINGS["random"], 64, 48, device=device)
    wide = torch.cat([p.x, p.x], 1)
    off = torch.cat([p.x.flatten()[:1], p.x.flatten()])  # rows begin off 16 bytes
    row = p._replace(x=p.x[:1].expand_as(p.x).contiguous())
    views = [
        (p, wide[:, :64]),
        (p, wide.repeat_interleave(2, 1)[:, ::2][:, :64]),
        (p, off[1:].view_as(p.x)),
        (p, p.x.t().contiguous().t()),
        (row, p.x[:1].expand_as(p.x)),
    ]
    for dense, view in views:
        expected = reference.run(dense, recipe)
        found = reference.run(dense._replace(x=view), recipe)
        for name, a, b in zip(expected._fields, found, expected, strict=True):
            assert_same_bits(a, b, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_grouped_linear_is_deterministic(device, recipe):
    p = reference.problem(ROUTINGS["skewed"], 96, 80, device=device)
    first = reference.run(p, recipe)
    for _ in range(3):
        for name, a, b in zip(first._fields, reference.run(p, recipe), first, strict=True):
            assert_same_bits(a, b, name)


def test_grouped_linear_non_finite_values_stay_in_their_row(device):
    p = reference.problem((20, 30), 64, 48, device=device)
    p.x[25, 3] = torch.nan
    y = OPS.grouped_linear(p.x, p.weight, p.offsets)
    assert y[25].isnan().all()
    assert y[:25].isfinite().all()
    assert y[26:].isfinite().all()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_grouped_linear_gradients_that_nobody_asks_for(device, frozen):
    p = reference.problem(ROUTINGS["random"], 64, 48, device=device)
    expected = reference.run(p, fp8.recipe.DEFAULT_GROUPED_RECIPE)
    x, weight = (
        t.detach().requires_grad_(name != frozen) for name, t in (("x", p.x), ("weight", p.weight))
    )
    OPS.grouped_linear(x, weight, p.offsets, p.bias).backward(p.dy)
    if frozen == "x":
        assert_same_bits(weight.grad, expected.dw)
    else:
        assert_same_bits(x.grad, expected.dx)


def test_grouped_linear_under_autocast(device):
    p = reference.problem(ROUTINGS["random"], 64, 48, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y = OPS.grouped_linear(p.x, p.weight, p.offsets, p.bias)
    b = [t.bfloat16() for t in (p.x, p.weight, p.bias)]
    assert_same_bits(y, OPS.grouped_linear(b[0], b[1], p.offsets, b[2]))


def test_grouped_linear_double_backward_is_refused(device):
    p = reference.problem((9, 8), 32, 16, device=device)
    x = p.x.detach().requires_grad_()
    y = OPS.grouped_linear(x, p.weight, p.offsets)
    (dx,) = torch.autograd.grad(y, x, p.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="_grouped_backward"):
        dx.sum().backward()


def valid():
    return {
        "x": torch.randn(6, 32),
        "weight": torch.randn(2, 16, 32),
        "offsets": torch.tensor([2, 6], dtype=torch.int32),
        "bias": torch.randn(2, 16),
        "recipe": "rowwise",
    }


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.randn(6, 32).double()}, TypeError, "expected x in bfloat16"),
        ({"x": torch.randn(6, 32).half()}, TypeError, "weight in x's dtype float16"),
        ({"x": torch.randn(2, 3, 32)}, ValueError, r"expected x \[T, K\], got shape \[2, 3, 32\]"),
        ({"weight": torch.randn(16, 32)}, ValueError, r"expected weight \[E, N, K\]"),
        ({"weight": torch.randn(2, 16, 8)}, ValueError, "must share K"),
        ({"offsets": torch.tensor([2, 6])}, TypeError, "offsets in int32, got int64"),
        (
            {"offsets": torch.tensor([6], dtype=torch.int32)},
            ValueError,
            r"\[E\] = \[2\], got \[1\]",
        ),
        ({"bias": torch.randn(16)}, ValueError, r"bias of shape \[E, N\] = \[2, 16\]"),
        ({"bias": torch.randn(2, 16).half()}, TypeError, "bias in x's dtype"),
        ({"x": torch.randn(6, 32, device="meta")}, ValueError, "weight on the device of x"),
    ],
)
def test_grouped_linear_errors(change, error, match):
    with pytest.raises(error, match=match):
        fp8.ops.grouped_linear(**(valid() | change))


@pytest.mark.parametrize("option", ["", ":power_of_two"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouped_linear_quantizes_as_quantize_rowwise(device, routing, option):
    """The columns of x within each group, which the backward reads: codes and scales."""
    p = reference.problem(ROUTINGS[routing], 96, 80, device=device)
    number = ROWWISE | (POWER_OF_TWO if option else 0)
    made = OPS._grouped_forward(p.x, p.weight, p.offsets, None, number, True)
    x_t, scale, ends = made[1:4]
    begin = 0
    for g, rows in enumerate(reference.slices(p.offsets)):
        count = rows.stop - rows.start
        columns = p.x[rows].t().contiguous()
        if count > 0:
            expected = OPS.quantize_rowwise(columns, power_of_two=bool(option))
            assert_same_bits(x_t[:96, begin : begin + count], expected[0], f"codes of group {g}")
            assert_same_bits(scale[g, :96], expected[1].squeeze(1), f"scales of group {g}")
        begin = int(ends[g])
    assert not option or (scale.frexp().mantissa == 0.5).all()


@pytest.mark.parametrize(
    "recipe", ["tensorwise", "delayed", "tensorwise:power_of_two", "x", "rowwise:", ""]
)
def test_grouped_linear_error_recipe(recipe):
    """It says what grouped products take, and which recipes those are."""
    known = ", ".join(repr(name) for name in RECIPES)
    text = (
        "fp8::grouped_linear: expected a recipe with scales per row or block, as the grouped "
        f"products take: {known}, with options out of ':power_of_two', got {recipe!r}"
    )
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        fp8.ops.grouped_linear(**(valid() | {"recipe": recipe}))


def test_private_operators_refuse_the_number_of_another_recipe():
    with pytest.raises(ValueError, match=r"grouped products take, got 0 \('tensorwise'\)"):
        OPS._grouped_forward(*(t for t in valid().values() if isinstance(t, torch.Tensor)), 0, True)


def test_grouped_linear_takes_1023_groups():
    offsets = torch.full((1024,), 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 1023 groups, got 1024"):
        OPS.grouped_linear(torch.randn(3, 16), torch.randn(1024, 16, 16), offsets)
    y = OPS.grouped_linear(torch.randn(3, 16), torch.randn(1023, 16, 16), offsets[:1023])
    assert y.shape == (3, 16)
