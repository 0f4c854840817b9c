"""What is known of a function that rotates q and k by their positions, and the operator in place of
it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_rope = torch.ops.fp8._rope.default

LAYOUTS = ("halves", "interleaved", "interleaved_to_halves")  # as core::RopeLayout counts them
ROUNDINGS = ("each", "sum", "once")  # as RopeRounding does: csrc/torch/rope/rope_ops.h
_KEEPS_MINUS_ZERO = 32  # and this bit of a form's number is there too

WHOLE, FIRST_HALF, PAIRS = "whole", "first half", "pairs"
"""What a row of cos has: a column for each that is rotated; the same, of which the first half has
one for each pair; or that half alone."""


class RopeSpec(NamedTuple):
    """What a function was found to compute."""

    names: tuple[str, ...]  # of its arguments, in order
    defaults: tuple[tuple[str, Any], ...]
    q: str
    k: str | None  # None: it rotates one tensor, and returns one
    cos: str
    sin: str
    axis: str | None  # the argument that says where cos gets a dimension for the heads
    layout: str
    columns: str
    contiguous: bool = False  # are results; else their dimensions lie in the order of q's
    partial: bool | None = None  # the same where columns are left alone; None: it leaves none
    keeps_minus_zero: bool = False  # in gradients
    # Dimensions of q and of cos, and the axis, of calls that were seen; where cos gets a dimension
    # then, if it does, and which of q's are the heads.
    shapes: tuple[tuple[int, int, int | None, int | None, int], ...] = ()
    any_batch: bool = False  # whether cos may be that of one batch
    # Dtypes of q and of cos, and the number of the form that it computes then.
    forms: tuple[tuple[torch.dtype, torch.dtype, int], ...] = ()

    def form(self, rounding: str) -> int:
        """The number of a form for torch.ops.fp8._rope."""
        number = LAYOUTS.index(self.layout) | ROUNDINGS.index(rounding) << 2
        return number | _KEEPS_MINUS_ZERO * self.keeps_minus_zero

    def rotary(self, width: int) -> int:
        """Columns that are rotated where a row of cos has `width`."""
        return 2 * width if self.columns == PAIRS else width


RopeSpec.__module__ = "fp8.nn"

Rotated = Tensor | tuple[Tensor, ...]


def rotate(
    spec: RopeSpec,
    form: int,
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    place: int | None,
) -> Rotated:
    """What the function returns, by the operator. place: where cos gets a dimension."""
    width = cos.shape[-1]
    rotary = spec.rotary(width)
    if spec.columns == FIRST_HALF:
        cos, sin = cos[..., : width // 2], sin[..., : width // 2]
    if place is not None:
        cos, sin = cos.unsqueeze(place), sin.unsqueeze(place)
    contiguous = spec.contiguous if rotary == q.shape[-1] else spec.partial
    order = list(range(q.dim())) if contiguous else []
    made: tuple[Tensor, Tensor] = _rope(q, k, cos, sin, rotary, form, None, order, order)
    return made[0] if k is None else made


def rotated(
    spec: RopeSpec, q: Any, k: Any, cos: Any, sin: Any, axis: Any
) -> Rotated | None:
    """The same, or None where a call is not of the kind that was seen."""
    if type(q) is not Tensor or type(cos) is not Tensor or type(sin) is not Tensor:
        return None
    if q.is_nested or not (q.is_cuda or q.is_cpu) or cos.device != q.device:
        return None
    if sin.dtype is not cos.dtype or sin.shape != cos.shape or sin.device != q.device:
        return None
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return None
    form = _looked_up(spec.forms, 2, q.dtype, cos.dtype)
    shape = _looked_up(spec.shapes, 3, q.dim(), cos.dim(), axis)
    if form is None or shape is None:
        return None
    place, heads = shape
    rotary = spec.rotary(cos.shape[-1])
    if rotary % 2 or rotary > q.shape[-1] or (rotary < q.shape[-1] and spec.partial is None):
        return None
    for x in (q,) if spec.k is None else (q, k):
        if type(x) is not Tensor or x.dtype is not q.dtype or x.dim() != q.dim():
            return None
        if x.is_nested or x.device != q.device or x.shape[-1] != q.shape[-1]:
            return None
        if x.stride(-1) != 1 or not _fits(spec, cos, x, place, heads):
            return None
    return rotate(spec, form[0], q, k, cos, sin, place)


def _looked_up(table: tuple[tuple[Any, ...], ...], length: int, *key: Any) -> Any:
    """The rest of the row that begins with the key, of this length; None if there is none."""
    for row in table:
        if row[:length] == key:
            return row[length:]
    return None


def _fits(spec: RopeSpec, cos: Tensor, x: Tensor, place: int | None, heads: int) -> bool:
    """Whether cos is one for each position of x, or of each batch too."""
    angles, rows = list(cos.shape[:-1]), list(x.shape[:-1])
    del rows[heads]
    if place is None and angles.pop(heads) != 1:
        return False
    batches = len(angles) - 1
    for i, size in enumerate(reversed(angles)):
        if size != rows[-1 - i] and not (spec.any_batch and size == 1 and i == batches > 0):
            return False
    return True
