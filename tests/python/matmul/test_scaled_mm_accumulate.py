"""scaled_mm_accumulate_: out += product, in place, in each output dtype."""

from __future__ import annotations

import bounds
import operands
import pytest
import torch
from operands import GRANULARITIES
from reference import E5M2, FLOAT_DTYPES, assert_same_bits

import fp8

OPS = torch.ops.fp8


def check(data: operands.Operands, out: torch.Tensor, fast_accum: bool = False) -> None:
    before = out.clone()
    OPS.scaled_mm_accumulate_(out, *data, fast_accum)
    expected = bounds.product(*data, addend=before)
    bounds.assert_within(out, expected, operands.accumulation(data, fast_accum))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fast_accum", [False, True])
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("k", [16, 1024, 4096])
def test_scaled_mm_accumulate_values(device, k, out_dtype, fast_accum, granularity):
    data = operands.make(80, 96, k, granularity, device)
    check(data, (torch.randn(80, 96, device=device) * 3).to(out_dtype), fast_accum)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (7, 9, 5), (17, 33, 65), (32, 1, 48), (3, 40, 100)]
)
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
def test_scaled_mm_accumulate_odd_shapes(device, m, n, k, out_dtype, granularity):
    data = operands.make(m, n, k, granularity, device, E5M2)
    check(data, torch.randn(m, n, device=device).to(out_dtype))


def test_scaled_mm_accumulate_twice(device):
    """As over two micro-batches of gradient accumulation: equals the two products added in fp32."""
    first, second = (operands.make(64, 48, 128, "tensorwise", device) for _ in range(2))
    out = torch.zeros(64, 48, device=device)
    OPS.scaled_mm_accumulate_(out, *first)
    assert_same_bits(out, OPS.scaled_mm(*first, None, torch.float32, False), "from zero")
    check(second, out)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 16, 32), (16, 0, 32), (16, 24, 0), (0, 0, 0)])
def test_scaled_mm_accumulate_nothing(device, m, n, k, granularity):
    data = operands.make(m, n, k, granularity, device)
    out = torch.randn(m, n, device=device)
    before = out.clone()
    OPS.scaled_mm_accumulate_(out, *data)
    assert_same_bits(out, before)


def test_scaled_mm_accumulate_strided_out(device):
    """Rows with a gap, a transposed and a misaligned out; nothing around it is written."""
    data = operands.make(40, 48, 64, "tensorwise", device)
    wide = torch.full((41, 64), 7.0, device=device)
    views = {
        "row gap": wide.clone()[:40, :48],
        "odd offset": wide.clone()[1:, 5:53],
        "transposed": torch.full((48, 40), 7.0, device=device).t(),
    }
    for out in views.values():
        outside = out._base.clone()
        check(data, out)
        inside = torch.zeros_like(outside, dtype=torch.bool)
        inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
        assert_same_bits(out._base[~inside], outside[~inside], "outside")


def test_scaled_mm_accumulate_returns_out(device):
    data = operands.make(16, 16, 16, "tensorwise", device)
    out = torch.zeros(16, 16, device=device)
    assert fp8.ops.scaled_mm_accumulate_(out, *data) is out


def test_scaled_mm_accumulate_is_seen_by_autograd(device):
    """The version counter of out counts the write: a graph that saved out raises."""
    data = operands.make(16, 16, 16, "tensorwise", device)
    out = torch.randn(16, 16, device=device, requires_grad=True) * 1
    y = out.square()
    before = out._version
    OPS.scaled_mm_accumulate_(out.detach(), *data)
    assert out._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_scaled_mm_accumulate_nan(device):
    a, b, scale_a, scale_b = operands.make(32, 48, 64, "rowwise", device)
    scale_a[3] = float("nan")
    out = torch.zeros(32, 48, device=device)
    OPS.scaled_mm_accumulate_(out, a, b, scale_a, scale_b)
    assert out[3].isnan().all()
    assert out.isnan().sum() == 48


def test_scaled_mm_accumulate_errors(device):
    op, data = OPS.scaled_mm_accumulate_, operands.make(32, 48, 64, "tensorwise", device)
    prefix = r"fp8::scaled_mm_accumulate_: .*"
    with pytest.raises(ValueError, match=prefix + r"out.*\[32, 48\].*\[32, 47\]"):
        op(torch.zeros(32, 47, device=device), *data)
    for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=prefix + "out"):
            op(torch.zeros(32, 48, device=device).to(dtype), *data)
    with pytest.raises(ValueError, match=prefix + "share K"):
        op(torch.zeros(32, 48, device=device), data.a[:, :32], *data[1:])
    with pytest.raises(ValueError, match=prefix + "meta"):
        op(torch.zeros(32, 48, device="meta"), *data)
