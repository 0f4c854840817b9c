"""Rotary position embedding in plain torch operations, rounded where each form of the operator
says, and q, k, cos and sin for it."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

LAYOUTS = ("halves", "interleaved", "interleaved_to_halves")
ROUNDINGS = ("each", "sum", "once")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = ((BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32))
"""Of q and k, and of cos and sin."""
FORMS = tuple(product(LAYOUTS, ROUNDINGS))

SHAPES = (
    # batch, heads of q and of k, positions, D, R
    (2, 3, 2, 5, 32, 32),
    (1, 4, 1, 7, 128, 128),
    (2, 2, 2, 3, 48, 16),
    (1, 3, 3, 4, 20, 20),  # no whole vectors
    (2, 1, 1, 3, 33, 10),
    (1, 9, 5, 1, 64, 64),
    (3, 2, 1, 2, 24, 0),
    (1, 2, 1, 3, 18, 2),
)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def eager(x: Tensor, cos: Tensor, sin: Tensor, layout: str, rounding: str, rotary: int) -> Tensor:
    """As models write it. cos and sin have `rotary` columns, or half of them."""
    per_pair = cos.shape[-1] != rotary
    if per_pair and layout == "halves":
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    elif per_pair:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    turned, rest = x[..., :rotary], x[..., rotary:]
    rotate = rotate_half if layout == "halves" else rotate_pairs
    if rounding == "each":
        y = turned * cos + rotate(turned) * sin
    elif rounding == "sum":
        y = (turned.float() * cos + rotate(turned).float() * sin).to(x.dtype)
    else:
        wide = turned.float()
        y = (wide * cos + rotate(wide) * sin).to(x.dtype)
    if layout == "interleaved_to_halves":
        y = torch.cat((y[..., 0::2], y[..., 1::2]), dim=-1)
    return torch.cat((y, rest), dim=-1) if rest.shape[-1] else y


def heads(
    batch: int, count: int, positions: int, size: int, dtype: torch.dtype, device: str
) -> Tensor:
    """[B, H, S, D] where a projection's [B, S, H · D] has them, with zeros of both signs."""
    x = torch.randn(batch, positions, count, size).to(dtype)
    x[..., 0, ::3] = 0.0
    x[..., 0, 1::3] = -0.0
    return x.to(device).transpose(1, 2)


def problem(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], per_pair: bool, device: str
) -> list[Tensor]:
    """q, k, cos and sin, the angles of each batch."""
    batch, q_heads, k_heads, positions, size, rotary = shape
    q, k = (heads(batch, n, positions, size, dtypes[0], device) for n in (q_heads, k_heads))
    columns = rotary // 2 if per_pair else rotary
    angles = torch.randn(2, batch, 1, positions, columns).to(dtypes[1]).to(device)
    return [q, k, *angles]
