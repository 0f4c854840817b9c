"""Test data: kinds of distributions, every bit pattern, rounding midpoints, strided views."""

from __future__ import annotations

import numpy as np
import torch
from reference import midpoints
from torch import Tensor

# Magnitudes worth trying: the smallest and largest of the format, and for fp32 and bf16 those near
# the points where 448 / amax overflows (1.3e-36) or becomes subnormal.
_EXTREMES = {
    torch.float32: (1e-45, 1e-40, 1.1e-38, 1.3e-36, 1e-30, 1e30, 3e38),
    torch.bfloat16: (1e-40, 1.2e-38, 1.3e-36, 1e-30, 1e30, 3.3e38),
    torch.float16: (6e-8, 6e-5, 1e-3, 100.0, 65504.0),
}
KINDS = ("normal", "student_t", "lognormal", "subnormal", "extreme", "huge", "tiny", "zeros")


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random tensor, made on the CPU so that every device sees the same values."""
    normal = torch.randn(shape)
    smallest, largest = _EXTREMES[dtype][0], _EXTREMES[dtype][-1]
    if kind == "normal":
        x = normal
    elif kind == "student_t":  # two degrees of freedom: no variance, single outliers rule amax
        x = torch.distributions.StudentT(2.0).sample(shape)
    elif kind == "lognormal":
        x = (normal * 4).exp().clamp(max=largest) * normal.sign()
    elif kind == "subnormal":  # most values fall below the smallest normal fp8 number
        x = normal * 1e-4
        if x.numel():
            x.view(-1)[0] = 1.0
    elif kind == "extreme":
        choices = torch.tensor(_EXTREMES[dtype])
        x = choices[torch.randint(choices.numel(), shape)] * normal.sign()
    elif kind == "huge":
        x = normal.clamp(-3, 3) * (largest / 3)
    elif kind == "tiny":
        x = normal * (smallest * 4)
    elif kind == "zeros":
        x = torch.where(normal > 0, 0.0, -0.0)
    else:
        raise ValueError(kind)
    return x.to(dtype).to(device)


def every_16_bit_pattern(dtype: torch.dtype) -> Tensor:
    """All 65,536 values of bfloat16 or float16, in the order of their bits. [65536]"""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def rounding_midpoints(dtype: torch.dtype) -> Tensor:
    """fp32: each midpoint between codes of `dtype` and twice it, their neighbours by one and two
    ulps, and what lies beyond the largest value; with both signs."""
    points = midpoints(dtype).astype(np.float32)
    values = np.concatenate([points, 2 * points, 4 * points[-4:]])
    up, down = np.float32(np.inf), np.float32(-np.inf)
    near = [values, np.nextafter(values, up), np.nextafter(values, down)]
    near += [np.nextafter(near[1], up), np.nextafter(near[2], down)]
    every = np.concatenate([*near, np.float32([0.0, 1e-45, 464.0, 61440.0, 3.4e38])])
    return torch.from_numpy(np.concatenate([every, -every]))


def strided_views(x: Tensor) -> dict[str, Tensor]:
    """Views of equal values and other strides, from a matrix [M, K]."""
    rows, cols = x.shape
    wide = torch.full((rows * 2 + 1, cols * 2 + 3), float("nan"), dtype=x.dtype, device=x.device)
    views = {"transposed": x.t().contiguous().t()}
    views["odd_offset"] = wide[1 : 1 + rows, 3 : 3 + cols].copy_(x)
    views["step_2"] = wide.clone()[: 2 * rows : 2, : 2 * cols : 2].copy_(x)
    flat = torch.full((rows * cols + 1,), float("nan"), dtype=x.dtype, device=x.device)
    views["one_element_off"] = flat[1:].view(rows, cols).copy_(x)
    views["transposed_odd_offset"] = wide.t().clone().t()[1 : 1 + rows, 3 : 3 + cols].copy_(x)
    return views


def expanded_views(x: Tensor) -> dict[str, Tensor]:
    """Views with stride 0, from a matrix [M, K]."""
    rows, cols = x.shape
    return {
        "one_row": x[:1].expand(rows, cols),
        "one_column": x[:, :1].expand(rows, cols),
        "one_element": x[:1, :1].expand(rows, cols),
    }
