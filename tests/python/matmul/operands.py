"""Quantized operands for matmul tests."""

from __future__ import annotations

from typing import NamedTuple

import bounds
import reference
import torch
from torch import Tensor

OPS = torch.ops.fp8
GRANULARITIES = (
    "tensorwise",
    "rowwise",
    "1x128 128x128",  # of a and of b
    "128x128 1x128",
    "1x128 1x128",
)


class Operands(NamedTuple):
    a: Tensor  # [M, K]
    b: Tensor  # [N, K]
    scale_a: Tensor  # 0-dim, [M, 1], [M, ceil(K / 128)] or [ceil(M / 128), ceil(K / 128)]
    scale_b: Tensor  # the same with N


def make(
    m: int,
    n: int,
    k: int,
    granularity: str = "tensorwise",
    device: str = "cpu",
    a_dtype: torch.dtype = torch.float8_e4m3fn,
    b_dtype: torch.dtype = torch.float8_e4m3fn,
    positive: bool = False,
) -> Operands:
    """randn, or uniform in [0, 1) for positive data. Rows of different magnitude, so that a swapped
    or shifted scale vector shows."""
    draw = torch.rand if positive else torch.randn
    parts = granularity.split() if "x" in granularity else [granularity] * 2
    names = [f"blockwise_{part}" if "x" in part else part for part in parts]
    quantize_a, quantize_b = (getattr(OPS, f"quantize_{name}") for name in names)
    left = draw(m, k) * torch.linspace(0.5, 2, m).unsqueeze(1)
    right = draw(n, k) * torch.linspace(2, 0.25, n).unsqueeze(1) / max(k, 1) ** 0.5
    a, scale_a = quantize_a(left.to(device), a_dtype)
    b, scale_b = quantize_b(right.to(device), b_dtype)
    return Operands(a, b, scale_a, scale_b)


def accumulation(operands: Operands, fast_accum: bool) -> bounds.Accumulation:
    """With block scales sums are promoted whatever is asked for."""
    a, b, scale_a, scale_b = operands
    blocks = reference.is_blockwise(scale_a, a) or reference.is_blockwise(scale_b, b)
    return bounds.accumulation_of(a.device.type, fast_accum and not blocks)


def check(
    operands: Operands,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = True,
) -> Tensor:
    """scaled_mm on the operands, held against the fp64 product."""
    a, b, scale_a, scale_b = operands
    out = OPS.scaled_mm(a, b, scale_a, scale_b, bias, out_dtype, fast_accum)
    assert out.dtype == out_dtype
    assert out.is_contiguous()
    assert out.device == a.device
    assert out.shape == (a.shape[0], b.shape[0])
    expected = bounds.product(a, b, scale_a, scale_b, bias)
    bounds.assert_within(out, expected, accumulation(operands, fast_accum))
    return out
