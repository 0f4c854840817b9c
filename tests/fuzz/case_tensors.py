"""Tensors of a case: values of every kind, in memory of every layout.

Values are made on the CPU from a seed, so that each device sees the same. What lies between and
around the elements of a view is NaN: an operator that reads it gives itself away.
"""

from __future__ import annotations

import inputs
import torch
from reference import FLOAT_DTYPES
from torch import Tensor

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
MILD = ("ones", "normal", "student_t", "zeros", "one_hot", "subnormal")
# Beyond inputs.KINDS: constants, one element that is not zero, elements that are no number.
KINDS = (*MILD, "lognormal", "tiny", "huge", "extreme", "one_nan", "one_inf", "nan")
# Memory with one place for each element, and views of which several elements share one.
DENSE = ("contiguous", "offset", "sliced", "transposed", "step", "permuted")
LAYOUTS = (*DENSE, "one_row", "one_column", "overlapping")


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    torch.manual_seed(seed)
    if kind in inputs.KINDS:
        return inputs.make(kind, shape, dtype)
    if kind == "ones":
        return torch.ones(shape, dtype=dtype)
    if kind == "nan":
        return torch.full(shape, float("nan"), dtype=dtype)
    x = torch.zeros(shape) if kind == "one_hot" else torch.randn(shape)
    if x.numel():
        place = int(torch.randint(x.numel(), ()))
        one = {"one_hot": -3.0, "one_nan": float("nan"), "one_inf": float("-inf")}[kind]
        x.view(-1)[place] = one
    return x.to(dtype)


def _nan(shape: list[int], like: Tensor) -> Tensor:
    if like.dtype.itemsize == 1:  # of both fp8 formats
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=like.device).view(like.dtype)
    if not like.is_floating_point():
        return torch.full(shape, -1, dtype=like.dtype, device=like.device)
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of x's shape in memory of that layout. Dense ones hold x's values; the others what
    a view of x's memory gives."""
    shape = list(x.shape)
    if layout == "contiguous" or not shape:
        return x.contiguous()
    if layout == "offset":
        view = _nan([x.numel() + 1], x)[1:].view(shape)
    elif layout == "sliced":
        view = _nan([*(s + 1 for s in shape[:-1]), shape[-1] + 4], x)
        for dim, extent in enumerate(shape):
            view = view.narrow(dim, 3 if dim == len(shape) - 1 else 1, extent)
    elif layout == "step":
        view = _nan([2 * s for s in shape], x)[tuple(slice(None, None, 2) for _ in shape)]
    elif layout == "transposed":
        view = torch.empty([*shape[:-2], *shape[:-3:-1]], dtype=x.dtype, device=x.device)
        view = view.transpose(-1, -2) if len(shape) > 1 else view
    elif layout == "permuted":
        view = torch.empty(shape[::-1], dtype=x.dtype, device=x.device).permute(
            *range(len(shape) - 1, -1, -1)
        )
    elif x.numel() == 0:
        return x
    elif layout == "one_row":
        return x[:1].expand(shape)
    elif layout == "one_column":
        return x[..., :1].expand(shape)
    else:
        assert layout == "overlapping", layout
        count = sum(s - 1 for s in shape) + 1
        return x.reshape(-1)[:count].clone().as_strided(shape, [1] * len(shape))
    return view.copy_(x)


def tensor(
    kind: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str
) -> Tensor:
    return laid_out(make(kind, shape, dtype, seed).to(device), layout)
