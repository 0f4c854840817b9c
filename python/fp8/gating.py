"""Which gating an experts module of transformers has, in the words of `fp8.ops.moe_experts`.

A module's `_apply_gate` is any function of [rows, 2 I], and its class may override it. So it is
asked: its values on a few numbers are compared with those of each gating that the operator knows.
A gating that differs anywhere near common values is never taken for another.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FOUND = "fp8_gate"  # the attribute that keeps the answer; None: not one of those


class Gate(NamedTuple):
    """Arguments of `fp8.ops.moe_experts`."""

    activation: str
    interleaved: bool
    alpha: float
    limit: float


def gate_of(module: nn.Module) -> Gate | None:
    """The module's gating; None if the operator does not have it. Found once per module."""
    have = vars(module)
    if _FOUND not in have:
        if not getattr(module, "has_gate", True) or torch.compiler.is_compiling():
            return None  # a tensor's values cannot be looked at while compiling
        have[_FOUND] = _find(module)
    gate: Gate | None = have[_FOUND]
    return gate


def forget_gate(module: nn.Module) -> None:
    """Takes back what gate_of noted on the module."""
    vars(module).pop(_FOUND, None)


def _find(module: nn.Module) -> Gate | None:
    # Gates and ups in either layout pass the limits in use (7 to 10), on both sides.
    probe = torch.cat([torch.linspace(-13, 17, 64), torch.linspace(19, -15, 64)])[None]
    try:
        with torch.no_grad():
            values = module._apply_gate(probe.clone())  # type: ignore[operator]
    except Exception:
        return None  # it wants something else than numbers: one of its own, in any case
    if not isinstance(values, Tensor) or values.shape != (1, 64):
        return None
    alpha = _number(module, ("alpha", "swiglu_alpha"), 1.702)
    limit = _number(module, ("limit", "swiglu_limit"), 7.0)
    for interleaved in (False, True):
        gate, up = (probe[:, ::2], probe[:, 1::2]) if interleaved else probe.chunk(2, dim=-1)
        clamped = gate.clamp(max=limit)
        known = {
            "silu": F.silu(gate) * up,
            "gelu": F.gelu(gate) * up,
            "gelu_tanh": F.gelu(gate, approximate="tanh") * up,
            "clamped_silu": clamped
            * torch.sigmoid(alpha * clamped)
            * (up.clamp(-limit, limit) + 1),
        }
        for activation, expected in known.items():
            if torch.allclose(values.float(), expected, rtol=1e-5, atol=1e-6):
                return Gate(activation, interleaved, alpha, limit)
    return None


def _number(module: nn.Module, names: tuple[str, ...], default: float) -> float:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return default
