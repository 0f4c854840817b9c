"""Scales of a weight that is FP8: the names and shapes that checkpoints give them, and what they
mean.

A scale always multiplies, w = code · scale, whatever it is called. Which elements share one is told
by its shape: a single element, one per row, or one per block of 128 x 128.
"""

from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["tensorwise", "rowwise", "blockwise"]

WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "scale", "scale_weight", "qscale_weight")
"""What a weight's scale is called, in the order in which a checkpoint is searched."""

INPUT_SCALES = ("input_scale", "activation_scale", "scale_input", "qscale_act")
"""What the static scale of a layer's input is called."""

EXACT = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
"""The dtypes whose every value float32 has."""


def blocks_of(rows: int, cols: int) -> tuple[int, int]:
    """Blocks of 128 x 128, partial ones included."""
    return -(-rows // 128), -(-cols // 128)


def usual_input(granularity: Granularity) -> Granularity:
    """How the input beside such a weight is scaled if nothing else is known."""
    return "blockwise" if granularity == "blockwise" else "rowwise"


def go_together(weight: Granularity, input: Granularity) -> bool:
    """Whether there is a product of the two: blocks go with blocks."""
    return (weight == "blockwise") == (input == "blockwise")


def shape_of(granularity: Granularity, rows: int, cols: int) -> tuple[int, ...]:
    """The shape of new scales of a weight [rows, cols]: of one dimension at least, which FSDP2
    wants of a parameter."""
    if granularity == "blockwise":
        return blocks_of(rows, cols)
    return (rows, 1) if granularity == "rowwise" else (1,)


def granularity_of(shape: tuple[int, ...], rows: int, cols: int) -> Granularity | None:
    """Which elements of a weight [rows, cols] share a scale, by the shape of all of them; None for
    a shape that means nothing. One element is of the tensor, but [1, 1] of a weight of one block;
    [rows, 1], [rows] and [1, rows] are of rows, but for the shape of the blocks, which are blocks
    unless it is [rows, 1].
    """
    shape = tuple(shape)
    if torch.Size(shape).numel() == 1:
        return "blockwise" if shape == blocks_of(rows, cols) else "tensorwise"
    if shape == (rows, 1):
        return "rowwise"
    if shape == blocks_of(rows, cols):
        return "blockwise"
    return "rowwise" if shape in ((rows,), (1, rows)) else None


def canonical(scale: Tensor, granularity: Granularity, rows: int, cols: int) -> Tensor:
    """A view of `scale` as [], [rows, 1] or [ceil(rows / 128), ceil(cols / 128)]. Raises
    RuntimeError, of view, where there are not so many."""
    shape = shape_of(granularity, rows, cols)
    return scale.reshape(() if granularity == "tensorwise" else shape)


def to_float32(scale: Tensor, what: str) -> Tensor:
    """The same numbers in float32. Raises TypeError, that begins with `what`, for a dtype that has
    others too."""
    if scale.dtype not in EXACT:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in EXACT)
        got = str(scale.dtype).removeprefix("torch.")
        raise TypeError(f"{what}: expected a scale in {names}, got {got}")
    if scale.dtype is torch.float8_e8m0fnu:
        # 2^(byte - 127), subnormal for 0, NaN for 255: torch's own cast, but on every device.
        exponent = scale.view(torch.uint8).to(torch.int32)
        bits = exponent << 23
        bits = torch.where(exponent == 0, 1 << 22, bits)
        return torch.where(exponent == 255, 0x7FC00000, bits).view(torch.float32)
    return scale.to(torch.float32)
