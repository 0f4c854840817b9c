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


def rotated(spec: RopeSpec, q: Any, k: Any, cos: Any, sin: Any, axis: Any) -> Rotated | None:
    """The same, or None where a call is not of the kind that was seen."""
    if type(q) is not Tensor or type(cos) is not Tensor or type(sin) is not Tensor:
        return None
    dtype, device, columns = q.dtype, q.device, q.shape[-1]
    if q.is_nested or device.type not in ("cuda", "cpu") or cos.device != device:
        return None
    if sin.dtype is not cos.dtype or sin.shape != cos.shape or sin.device != device:
        return None
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        return None
    for x_dtype, cos_dtype, form in spec.forms:  # noqa: B007
        if x_dtype is dtype and cos_dtype is cos.dtype:
            break
    else:
        return None
    for x_dim, cos_dim, axis_given, place, heads in spec.shapes:  # noqa: B007
        if x_dim == q.dim() and cos_dim == cos.dim() and axis_given == axis:
            break
    else:
        return None
    rotary = spec.rotary(cos.shape[-1])
    if rotary % 2 or rotary > columns or (rotary < columns and spec.partial is None):
        return None
    angles = [*cos.shape[:-1]]
    if place is None and angles.pop(heads) != 1:
        return None
    for x in (q,) if spec.k is None else (q, k):
        if type(x) is not Tensor or x.dtype is not dtype or x.dim() != x_dim or x.is_nested:
            return None
        if x.device != device or x.shape[-1] != columns or x.stride(-1) != 1:
            return None
        if not _fits(angles, x, heads, spec.any_batch):
            return None
    return rotate(spec, form, q, k, cos, sin, place)


def _fits(angles: list[int], x: Tensor, heads: int, any_batch: bool) -> bool:
    """Whether these leading sizes of cos are those of x, but for the heads; or of one batch."""
    rows = [*x.shape[:-1]]
    del rows[heads]
    rows = rows[len(rows) - len(angles) :]
    if rows == angles:
        return True
    return any_batch and len(angles) > 1 and angles[0] == 1 and rows[1:] == angles[1:]
