"""Gated activations and their derivatives in fp64, with the error that follows from their inputs'.

The slopes of all activations stay below 1.13, the slopes of their derivatives below 0.9 (times
alpha for the clamped one). At the limits of the clamped one a derivative jumps: an input that may
lie on either side may have either.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from error_bounds import Approx, approx, times
from torch import Tensor

_SLOPE, _CURVATURE = 1.13, 0.9
# fp32's exp, tanh and erf, and what cancels around them, relative to 1 + |gate|.
_EVALUATION = 2.0**-18


class Gating(NamedTuple):
    activation: str
    interleaved: bool
    alpha: float
    limit: float

    def halves(self, g: Approx) -> tuple[Approx, Approx]:
        """gate and up of g [rows, 2 I]."""
        if self.interleaved:
            return tuple(Approx(g.value[:, i::2], g.error[:, i::2]) for i in (0, 1))
        (gate, up), (gate_error, up_error) = g.value.chunk(2, 1), g.error.chunk(2, 1)
        return Approx(gate, gate_error), Approx(up, up_error)

    def joined(self, gate: Approx, up: Approx) -> Approx:
        """The other way round."""
        join = torch.stack if self.interleaved else torch.cat
        rows, features = gate.value.shape
        parts = (join((a, b), -1) for a, b in zip(gate, up, strict=True))
        return Approx(*(part.reshape(rows, 2 * features) for part in parts))

    def unit(self, gate: Approx, up: Approx) -> tuple[Approx, Approx, Approx]:
        """h, and its derivatives for gate and up."""
        evaluation = _EVALUATION * (1 + gate.largest())
        if self.activation != "clamped_silu":
            value, slope = _activated(gate.value, self.activation)
            act = approx(value, _SLOPE * gate.error + evaluation)
            d_act = approx(slope, _CURVATURE * gate.error + evaluation)
            if self.activation == "gelu_tanh":  # its slope takes a square, in torch too
                beyond = gate.largest() > 1e18
                d_act = approx(slope, torch.where(beyond, math.inf, d_act.error))
            return times(act, up), times(d_act, up), act
        passes, known = _side(gate, self.limit)
        clamped = gate.value.clamp(max=self.limit)
        value, slope = _silu(clamped, self.alpha)
        act = approx(value, _SLOPE * gate.error + evaluation)
        curvature = _CURVATURE * max(self.alpha, 1.0)
        error = torch.where(known, curvature * gate.error + evaluation, 2 * _SLOPE)
        d_act = approx(slope * passes, torch.where(passes.bool() | ~known, error, 0.0))
        below, below_known = _side(up, self.limit)
        above, above_known = _side(Approx(-up.value, up.error), self.limit)
        factor = approx(up.value.clamp(-self.limit, self.limit) + 1, up.error + evaluation)
        # Of a NaN either slope will do: torch's clamp has 0, the operator 1.
        either = (~(below_known & above_known) | up.value.isnan()).double()
        d_factor = approx(below * above, either)
        return times(act, factor), times(d_act, factor), times(act, d_factor)


def _side(a: Approx, limit: float) -> tuple[Tensor, Tensor]:
    """1 where a is not above the limit, and whether that is certain."""
    return (~(a.value > limit)).double(), (a.value - limit).abs() > a.error


def _silu(x: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(alpha * x)
    return x * s, s * (1 + alpha * x * (1 - s))


def _activated(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if name == "silu":
        return _silu(x)
    if name == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * 0.5**0.5))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), slope
