"""linear_frozen: the bits of fused_linear where that quantizes alike, values against fp64, every
shape of a scale, and weights that lie anywhere."""

from __future__ import annotations

import bounds
import pytest
import torch
from frozen_reference import (
    DTYPES,
    FORMS,
    GRANULARITIES,
    SHAPES,
    dequantized,
    problem,
    quantized_input,
)
from reference import assert_same_bits

import fp8

SAME = {"tensorwise": "tensorwise", "rowwise": "rowwise", "blockwise": "blockwise"}


@pytest.mark.parametrize("recipe", SAME)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_frozen_has_the_bits_of_fused_linear(device, recipe, dtype, power_of_two, poisoned_memory):
    name = f"{recipe}:power_of_two" if power_of_two else recipe
    for shape in SHAPES:
        for bias in (False, True):
            p = problem(shape, recipe, dtype, bias=bias, device=device, power_of_two=power_of_two)
            ours = fp8.ops.linear_frozen(
                p.x,
                p.codes,
                p.scale,
                p.bias,
                input_granularity=SAME[recipe],
                power_of_two=power_of_two,
            )
            theirs = fp8.ops.fused_linear(p.x, p.weight, p.bias, name)
            assert ours.dtype == dtype
            assert_same_bits(ours, theirs, f"{shape} bias={bias}")


@pytest.mark.parametrize(("of_weight", "of_x"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_values(device, of_weight, of_x, dtype):
    for shape in SHAPES:
        p = problem(shape, of_weight, dtype, bias=True, device=device)
        y = fp8.ops.linear_frozen(p.x, p.codes, p.scale, p.bias, input_granularity=of_x)
        x, weight = quantized_input(p.x, of_x), dequantized(p.codes, p.scale)
        expected = x @ weight.t() + p.bias.double()
        size = x.abs() @ weight.abs().t() + p.bias.double().abs()
        k = p.x.shape[-1]
        kind = bounds.accumulation_of(device, of_weight != "blockwise")
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
        allowed = bounds.relative_error(k, kind) * size + 1.1 * rounding[dtype] * size + 2.0**-24
        assert bool(((y.double() - expected).abs() <= allowed).all()), (shape, dtype)


def test_frozen_defaults(device):
    for of_weight, of_x in (("tensorwise", "rowwise"), ("rowwise", "rowwise")):
        p = problem(SHAPES[0], of_weight, device=device)
        named = fp8.ops.linear_frozen(p.x, p.codes, p.scale, input_granularity=of_x)
        assert_same_bits(fp8.ops.linear_frozen(p.x, p.codes, p.scale), named)
    p = problem(SHAPES[2], "blockwise", device=device)
    named = fp8.ops.linear_frozen(p.x, p.codes, p.scale, input_granularity="blockwise")
    assert_same_bits(fp8.ops.linear_frozen(p.x, p.codes, p.scale), named)


def test_frozen_shapes_of_scales(device):
    p = problem(((9,), 272, 144), "tensorwise", device=device)
    expected = fp8.ops.linear_frozen(p.x, p.codes, p.scale)
    for shape in ((), (1,), (1, 1), (1, 1, 1)):
        assert_same_bits(fp8.ops.linear_frozen(p.x, p.codes, p.scale.reshape(shape)), expected)
    p = problem(((9,), 272, 144), "rowwise", device=device)
    expected = fp8.ops.linear_frozen(p.x, p.codes, p.scale)
    for shape in ((144,), (144, 1), (1, 144)):
        assert_same_bits(fp8.ops.linear_frozen(p.x, p.codes, p.scale.reshape(shape)), expected)


def test_frozen_scales_that_could_be_two_things(device):
    """[1, N] is the grid of blocks if it can be, and one element is the whole weight's, unless
    input_granularity says otherwise."""
    n, k = 3, 300  # the grid is [1, 3]
    p = problem(((4,), k, n), "blockwise", device=device)
    assert p.scale.shape == (1, 3)
    as_blocks = fp8.ops.linear_frozen(p.x, p.codes, p.scale, input_granularity="blockwise")
    assert_same_bits(fp8.ops.linear_frozen(p.x, p.codes, p.scale), as_blocks)
    by_row = fp8.ops.linear_frozen(p.x, p.codes, p.scale.reshape(3, 1))
    expected = quantized_input(p.x, "rowwise") @ dequantized(p.codes, p.scale.reshape(3, 1)).t()
    assert torch.allclose(by_row.double(), expected, rtol=2**-7, atol=2**-7)
    named = fp8.ops.linear_frozen(p.x, p.codes, p.scale, input_granularity="rowwise")
    assert_same_bits(named, by_row)
    p = problem(((4,), 64, 32), "blockwise", device=device)
    assert p.scale.shape == (1, 1)
    of_rows = fp8.ops.linear_frozen(p.x, p.codes, p.scale, input_granularity="rowwise")
    assert_same_bits(fp8.ops.linear_frozen(p.x, p.codes, p.scale), of_rows)
    p.x[:, 0] *= 0.5  # a scale for 64 elements is a row's
    of_blocks = fp8.ops.linear_frozen(p.x, p.codes, p.scale, input_granularity="blockwise")
    theirs = fp8.ops.fused_linear(p.x, p.weight, None, "blockwise")
    assert_same_bits(of_blocks, theirs)


@pytest.mark.parametrize("of_weight", ["tensorwise", "rowwise"])
def test_frozen_static_scale(device, of_weight):
    p = problem(SHAPES[1], of_weight, bias=True, device=device)
    scale = torch.tensor([0.004], device=device)  # saturates
    y = fp8.ops.linear_frozen(p.x, p.codes, p.scale, p.bias, scale)
    data, _ = fp8.ops.quantize_tensorwise(p.x, scale=scale[0])
    x = fp8.ops.dequantize(data, scale[0], torch.float32).double()
    assert float(x.abs().max()) == pytest.approx(448 * 0.004)
    expected = x @ dequantized(p.codes, p.scale).t() + p.bias.double()
    assert torch.allclose(y.double(), expected, rtol=2**-7, atol=2**-6)
    if of_weight == "tensorwise":
        theirs = fp8.ops.fused_linear(p.x, p.weight, p.bias, input_scale=scale[0])
        assert_same_bits(y, theirs)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_weights_lie_anywhere(device, granularity, poisoned_memory):
    """Views of larger tensors, transposed, off 16 bytes, scales with other strides."""
    p = problem(((17,), 272, 144), granularity, device=device)
    expected = fp8.ops.linear_frozen(p.x, p.codes, p.scale)
    flat = torch.zeros(p.codes.numel() + 3, dtype=torch.uint8, device=device)
    flat[3:] = p.codes.view(torch.uint8).flatten()
    wide = torch.zeros(144, 300, dtype=torch.uint8, device=device)
    wide[:, 5:277] = p.codes.view(torch.uint8)
    turned = p.codes.view(torch.uint8).t().contiguous().t()
    for codes in (flat[3:].view(144, 272), wide[:, 5:277], turned):
        y = fp8.ops.linear_frozen(p.x, codes.view(torch.float8_e4m3fn), p.scale)
        assert_same_bits(y, expected)
    storage = torch.full((p.scale.numel() + 1,), torch.nan, device=device)
    storage[1:] = p.scale.flatten()
    shifted = storage[1:].view(p.scale.shape)
    assert_same_bits(fp8.ops.linear_frozen(p.x, p.codes, shifted), expected)
    if p.scale.dim() == 2:
        other = p.scale.t().contiguous().t()
        assert_same_bits(fp8.ops.linear_frozen(p.x, p.codes, other), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_rows_do_not_depend_on_others(granularity):
    """Of rows that are scaled apart; on a CPU at any number of them."""
    p = problem(((16,), 256, 64), granularity)
    together = fp8.ops.linear_frozen(p.x, p.codes, p.scale)
    for i in range(16):
        one = fp8.ops.linear_frozen(p.x[i : i + 1], p.codes, p.scale)
        assert torch.allclose(one[0].float(), together[i].float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_hides_no_nan(device, granularity):
    p = problem(((8,), 256, 144), granularity, device=device)
    for value in (torch.nan, torch.inf):
        x = p.x.clone()
        x[3, 5] = value
        y = fp8.ops.linear_frozen(x, p.codes, p.scale)
        assert not bool(y[3].isfinite().any())
        assert bool(y[:3].isfinite().all())
    scale = p.scale.clone()
    scale.view(-1)[-1] = torch.nan
    assert bool(fp8.ops.linear_frozen(p.x, p.codes, scale)[:, -1].isnan().all())


def test_frozen_under_autocast(device):
    p = problem(SHAPES[0], "rowwise", torch.float32, bias=True, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = fp8.ops.linear_frozen(p.x, p.codes, p.scale, p.bias)
    expected = fp8.ops.linear_frozen(p.x.bfloat16(), p.codes, p.scale, p.bias.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, expected)
