"""Weights that are FP8, and what linear_frozen computes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fp8

GRANULARITIES = ("tensorwise", "rowwise", "blockwise")  # of the weight
FORMS = (  # of the weight, of x
    ("tensorwise", "tensorwise"),
    ("tensorwise", "rowwise"),
    ("rowwise", "tensorwise"),
    ("rowwise", "rowwise"),
    ("blockwise", "blockwise"),
)
SHAPES = (
    # leading dimensions of x, K, N
    ((32,), 64, 48),
    ((2, 3), 272, 144),
    ((70,), 200, 136),  # blocks of which the last are not whole
    ((5,), 33, 7),
    ((), 40, 16),
    ((0,), 16, 8),
    ((1,), 512, 256),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Problem:
    x: Tensor
    weight: Tensor  # in high precision
    codes: Tensor
    scale: Tensor
    bias: Tensor | None


def quantized(
    weight: Tensor, granularity: str, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes and scales as a checkpoint has them."""
    op = {
        "tensorwise": fp8.ops.quantize_tensorwise,
        "rowwise": fp8.ops.quantize_rowwise,
        "blockwise": fp8.ops.quantize_blockwise_128x128,
    }[granularity]
    codes, scale = op(weight, power_of_two=power_of_two)
    return codes.contiguous(), scale.contiguous()


def problem(
    shape: tuple[tuple[int, ...], int, int],
    granularity: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    device: str = "cpu",
    power_of_two: bool = False,
) -> Problem:
    leading, k, n = shape
    x = torch.randn(*leading, k, device=device).to(dtype)
    # Rows and blocks of unlike sizes, so that a scale of the wrong one shows.
    sizes = torch.logspace(-2, 1, n, device=device)[torch.randperm(n)]
    weight = (torch.randn(n, k, device=device) * sizes[:, None]).to(dtype)
    codes, scale = quantized(weight, granularity, power_of_two)
    values = torch.randn(n, device=device).to(dtype) if bias else None
    return Problem(x, weight, codes, scale, values)


def spread(scale: Tensor, codes: Tensor) -> Tensor:
    """A scale for each element of the codes."""
    n, k = codes.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(n, k)
    if scale.shape == (-(-n // 128), -(-k // 128)) and scale.shape != (n, 1):
        return scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return scale.reshape(n, 1).expand(n, k)


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """float64"""
    return codes.float().double() * spread(scale, codes).double()


def quantized_input(x: Tensor, granularity: str, power_of_two: bool = False) -> Tensor:
    """x as the product reads it, float64."""
    op = {
        "tensorwise": fp8.ops.quantize_tensorwise,
        "rowwise": fp8.ops.quantize_rowwise,
        "blockwise": fp8.ops.quantize_blockwise_1x128,
    }[granularity]
    data, scale = op(x, power_of_two=power_of_two)
    return fp8.ops.dequantize(data, scale, torch.float32).double()
