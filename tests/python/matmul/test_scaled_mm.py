"""scaled_mm against the fp64 product of the dequantized operands, within a derived bound."""

from __future__ import annotations

import bounds
import operands
import pytest
import torch
from operands import GRANULARITIES, Operands
from reference import E4M3, E5M2, FLOAT_DTYPES, assert_same_bits

OPS = torch.ops.fp8


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("k", [16, 64, 1024, 4096])
def test_scaled_mm_values(device, k, granularity, positive, fast_accum, out_dtype, poisoned_memory):
    data = operands.make(96, 80, k, granularity, device, positive=positive)
    operands.check(data, None, out_dtype, fast_accum)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("k", [1024, 4096, 16384])
@pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])
def test_scaled_mm_accumulation_error(k, granularity, positive):
    """On average, too, the error is what the model of bounds.py expects (twice it, plus the output
    rounding), and split accumulation is the more accurate one: the flag reaches the kernel."""
    data = operands.make(512, 768, k, granularity, "cuda", positive=positive)
    expected = bounds.product(*data)
    error = {}
    for name, fast_accum in (("fast", True), ("split", False)):
        out = OPS.scaled_mm(*data, None, torch.float32, fast_accum)
        bounds.assert_within(out, expected, name)
        error[name] = bounds.relative_rms(out, expected)
        assert error[name] <= 2 * bounds.expected_rms(k, positive, name), (name, error)
    if positive and k >= 4096:
        assert error["split"] < error["fast"] / 4, error


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("a_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("b_dtype", [E4M3, E5M2])
def test_scaled_mm_formats(device, a_dtype, b_dtype, fast_accum, granularity):
    """e5m2 with e5m2 too, which cuBLASLt refuses."""
    data = operands.make(48, 64, 96, granularity, device, a_dtype, b_dtype)
    for out_dtype in FLOAT_DTYPES:
        operands.check(data, None, out_dtype, fast_accum)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 1, 1),
        (1, 16, 16),
        (16, 1, 16),
        (2, 2, 2),
        (7, 9, 5),
        (17, 33, 65),
        (15, 40, 48),
        (33, 72, 100),
        (1, 4096, 64),
        (129, 20, 1000),
        (5, 300, 17),
        (100, 4, 128),
    ],
)
def test_scaled_mm_odd_shapes(device, m, n, k, granularity, poisoned_memory):
    data = operands.make(m, n, k, granularity, device)
    for bias in (None, torch.randn(n, device=device, dtype=torch.bfloat16)):
        for fast_accum in (True, False):
            operands.check(data, bias, torch.bfloat16, fast_accum)
            operands.check(data, bias, torch.float32, fast_accum)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 16, 32), (16, 0, 32), (0, 0, 16), (0, 5, 0)])
def test_scaled_mm_without_elements(device, m, n, k, granularity):
    data = operands.make(m, n, k, granularity, device)
    bias = torch.ones(n, device=device, dtype=torch.bfloat16)
    for given in (None, bias):
        out = OPS.scaled_mm(*data, given)
        assert out.shape == (m, n)
        assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
def test_scaled_mm_contracting_nothing(device, out_dtype, granularity, poisoned_memory):
    """K = 0: an empty sum is zero, so out is the bias."""
    data = operands.make(24, 32, 0, granularity, device)
    bias = torch.randn(32, device=device).to(out_dtype)
    zeros = torch.zeros(24, 32, device=device, dtype=out_dtype)
    assert_same_bits(OPS.scaled_mm(*data, None, out_dtype), zeros)
    assert_same_bits(OPS.scaled_mm(*data, bias, out_dtype), zeros + bias)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("out_dtype", "bias_dtype"),
    [*((dtype, dtype) for dtype in FLOAT_DTYPES), (torch.float32, torch.bfloat16)],
)
def test_scaled_mm_bias(device, out_dtype, bias_dtype, granularity):
    data = operands.make(50, 48, 64, granularity, device)
    wide = (torch.randn(2 * 48 + 1, device=device) * 10).to(bias_dtype)
    views = {"aligned": wide[:48], "odd offset": wide[1:49], "step": wide[1::2]}
    views["expanded"] = wide[:1].expand(48)
    for bias in views.values():
        for fast_accum in (True, False):
            operands.check(data, bias, out_dtype, fast_accum)


def misaligned(data: Operands) -> dict[str, Operands]:
    """The same operands where cuBLASLt's rules about pointers and strides do not hold."""
    a, b, scale_a, scale_b = data
    views = {}

    def byte_off(matrix):
        rows, cols = matrix.shape
        flat = torch.empty(rows * cols + 1, dtype=torch.uint8, device=matrix.device)[1:]
        return flat.view(matrix.dtype).view(rows, cols).copy_(matrix)

    def odd_stride(matrix):
        rows, cols = matrix.shape
        wide = torch.full((rows, cols + 5), 0x7F, dtype=torch.uint8, device=matrix.device)
        return wide.view(matrix.dtype)[:, 3 : 3 + cols].copy_(matrix)

    def spread(scale):
        """One of a stack: not at a 16-byte address, and with strides of 3."""
        return torch.full((*scale.shape, 3), float("nan"), device=scale.device)[..., 1]

    scales = [spread(scale).copy_(scale) for scale in (scale_a, scale_b)]
    views["a one byte off"] = Operands(byte_off(a), b, scale_a, scale_b)
    views["b one byte off"] = Operands(a, byte_off(b), scale_a, scale_b)
    views["odd row strides"] = Operands(odd_stride(a), odd_stride(b), scale_a, scale_b)
    views["column-major"] = Operands(a.t().contiguous().t(), b.t().contiguous().t(), *data[2:])
    views["scales of a stack"] = Operands(a, b, *scales)
    views["everything"] = Operands(byte_off(a), odd_stride(b), *scales)
    return views


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scaled_mm_misaligned_views(device, granularity):
    data = operands.make(40, 64, 96, granularity, device)
    for name, view in misaligned(data).items():
        for given, original in zip(view, data, strict=True):
            assert_same_bits(given, original, name)
        for fast_accum in (True, False):
            operands.check(view, None, torch.bfloat16, fast_accum)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scaled_mm_expanded_operand(device, granularity):
    a, b, scale_a, scale_b = operands.make(40, 64, 96, granularity, device)
    view = Operands(a[:1].expand(40, -1), b, scale_a, scale_b)
    operands.check(view)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scaled_mm_non_finite_scale(device, bad):
    """tensorwise: nothing stays finite. rowwise: only what the scale belongs to."""
    a, b, scale_a, scale_b = operands.make(32, 48, 64, "tensorwise", device)
    for scales in ((scale_a * bad, scale_b), (scale_a, scale_b * bad)):
        assert not OPS.scaled_mm(a, b, *scales).isfinite().any()
    a, b, scale_a, scale_b = operands.make(32, 48, 64, "rowwise", device)
    scale_a[3], scale_b[5] = bad, bad
    out = OPS.scaled_mm(a, b, scale_a, scale_b)
    expected = torch.ones(32, 48, dtype=torch.bool, device=device)
    expected[3], expected[:, 5] = False, False
    assert_same_bits(out.isfinite(), expected)


def test_scaled_mm_nan_data(device):
    """A NaN code, wherever it stands along K, reaches its row of the output, and only that one."""
    for position in (0, 17, 63):
        a, b, scale_a, scale_b = operands.make(32, 48, 64, "rowwise", device)
        a.view(torch.uint8)[4, position] = 0x7F
        out = OPS.scaled_mm(a, b, scale_a, scale_b)
        assert out[4].isnan().all()
        assert out.isnan().sum() == 48


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scaled_mm_is_deterministic(device, granularity):
    data = operands.make(200, 208, 512, granularity, device)
    for fast_accum in (True, False):
        first = OPS.scaled_mm(*data, fast_accum=fast_accum)
        for _ in range(3):
            assert_same_bits(OPS.scaled_mm(*data, fast_accum=fast_accum), first)


@pytest.mark.gpu
def test_scaled_mm_cuda_fallback_shapes():
    """Larger sizes that cuBLASLt refuses or does slowly."""
    for m, n, k in ((1000, 4100, 4100), (1, 4099, 4096), (4096, 1, 4096), (777, 4096, 4104)):
        for granularity in GRANULARITIES:
            operands.check(operands.make(m, n, k, granularity, "cuda"))
