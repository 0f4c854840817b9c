"""The forms of an MLP that `fp8.ops.mlp` has, and what each computes in PyTorch's own functions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._mlp import _ACTIVATIONS


class Form(NamedTuple):
    """Which child does what, and the arguments of `fp8.ops.mlp`."""

    gate: str  # names of children
    up: str | None  # None: merged, or a plain MLP
    down: str
    merged: bool
    activation: str
    gate_second: bool
    alpha: float
    limit: float


Form.__module__, Form.__qualname__ = "fp8.nn", "_MLPForm"  # what pickles name


def forms(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], alpha: float, limit: float
) -> Iterator[Form]:
    """Every form that layers of these names and sizes (in, out), called in this order, can have.

    alpha, limit: of the clamped gate.
    """
    (*first, down), (*firsts, (features, _)) = names, sizes
    width = firsts[0][1]
    widths = (features,) if len(first) == 2 else (features, 2 * features)
    if len(set(firsts)) > 1 or width not in widths or features == 0:
        return
    gated = len(first) == 2 or width == 2 * features
    for activation in (*_ACTIVATIONS, *(("clamped_silu",) if gated else ())):
        for turned in (False, True) if gated else (False,):
            if len(first) == 2:
                gate, up = first[::-1] if turned else first
                yield Form(gate, up, down, False, activation, False, alpha, limit)
            else:
                yield Form(first[0], None, down, gated, activation, turned, alpha, limit)


def expected(form: Form, gate: Tensor, up: Tensor | None) -> Tensor:
    """h in PyTorch's own functions, of what the first layers answer."""
    if form.merged:
        gate, up = gate.chunk(2, dim=-1)[:: -1 if form.gate_second else 1]
    if form.activation == "clamped_silu" and up is not None:
        gate = gate.clamp(max=form.limit)
        return gate * torch.sigmoid(form.alpha * gate) * (up.clamp(-form.limit, form.limit) + 1)
    h = _ACTIVATIONS[form.activation](gate)
    return h if up is None else h * up


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the bits of a NaN and the sign of zero."""
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def numbers() -> Tensor:
    """Both sides of every bend and limit in use (6 to 10), of any other below float16's maximum,
    near 0, and 0."""
    near = torch.linspace(-20, 20, 400, dtype=torch.float32)
    far = torch.logspace(1.3, 4.8, 64, dtype=torch.float32)
    small = torch.logspace(-6, 0, 64, dtype=torch.float32)
    return torch.cat([near, far, -far, small, -small, torch.zeros(8, dtype=torch.float32)])
