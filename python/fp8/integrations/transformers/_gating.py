"""Which gating an experts module of transformers has, in the words of `fp8.ops.moe_experts`.

A module's `_apply_gate` is any function of [rows, 2 I], and its class may override it. So it is
asked: its values on a few numbers are compared with those of each gating that the operator knows.
A gating that differs anywhere is never taken for another, nor is one that reads any tensor besides
its input, so that no parameter is dropped. The answer holds as long as nothing changes of what the
module is made of (`_probe.State`), which every call looks at.
"""

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu  # as they were when this was imported

from ._probe import State, undisturbed, values_of

_NOTES = "fp8_gate"  # the attribute of a module that has its Notes
_OWN = (_NOTES, "fp8_settings")


class Gate(NamedTuple):
    """Arguments of `fp8.ops.moe_experts`."""

    activation: str
    interleaved: bool
    alpha: float
    limit: float


class Notes:
    """What is known of one experts module: its gating, and whether it was called.

    A copy, deep or unpickled, knows only of the call: the rest refers to the original's objects.
    """

    called: bool | str
    """Whether the module's forward ran; "traced": a compiler ran through it."""

    def __init__(self, called: bool | str = False) -> None:
        self.called = called
        # One tuple: threads that call a module at once replace all of it.
        self._found: tuple[weakref.ref[nn.Module], State, Gate | None] | None = None

    def __reduce__(self) -> tuple[type["Notes"], tuple[bool | str]]:
        return Notes, (self.called,)

    def gate(self, module: nn.Module) -> Gate | None:
        """The gating of `module`, which has these notes; asked for anew if anything changed."""
        found = self._found
        if found is not None and found[0]() is module and found[1].same(module):
            return found[2]
        state = State(module, "_apply_gate", own=_OWN)
        gate = None if state.hooked else _find(module)  # hooks see every call, and only calls
        self._found = (weakref.ref(module), state, gate)
        return gate

    def traced_gate(self) -> tuple[str, bool, float, float] | None:
        """The gating if it is known and still holds. A compiler calls this while it traces, outside
        of the trace, and takes the answer for a constant (a plain tuple, as it can unpack)."""
        self.called = self.called or "traced"
        if self._found is None:
            return None
        owner, state, gate = self._found
        module = owner()
        if gate is None or module is None or not state.same(module):
            return None
        return (gate.activation, gate.interleaved, gate.alpha, gate.limit)

    traced_gate._dynamo_marked_constant = True  # type: ignore[attr-defined]
    # What torch.compiler.assume_constant_result sets, which would import the compiler.


def notes_of(module: nn.Module) -> Notes:
    """The module's notes, made where there are none."""
    notes: Notes | None = vars(module).get(_NOTES)
    if notes is None:
        notes = vars(module)[_NOTES] = Notes()
    return notes


def was_called(module: nn.Module) -> bool | str:
    """What `Notes.called` says."""
    notes: Notes | None = vars(module).get(_NOTES)
    return notes.called if notes is not None else False


def gate_of(module: nn.Module) -> Gate | None:
    """The module's gating; None if the operator does not have it. In a few microseconds, unless the
    module has changed since it was last asked for.

    While a compiler traces, values cannot be looked at: None, unless it was found before.
    """
    if not getattr(module, "has_gate", True):
        return None
    if torch.compiler.is_compiling():
        known: Notes | None = vars(module).get(_NOTES)
        return known.traced_gate() if known is not None else None  # type: ignore[return-value]
    return notes_of(module).gate(module)


def watch(module: nn.Module, gate_up: Tensor) -> None:
    """For a compiler's trace that takes gate_of(module) for a constant: runs a gate_up of no rows,
    [0, 2 I], through the gating, so that the trace depends on what that reads, and drops it."""
    module._apply_gate(gate_up)  # type: ignore[operator]


def forget_gate(module: nn.Module) -> None:
    """Takes back what was noted on the module."""
    vars(module).pop(_NOTES, None)


def _find(module: nn.Module) -> Gate | None:
    with undisturbed():
        probe = _numbers()
        apply: Any = module._apply_gate
        values = values_of(apply, probe)
        if values is None or values.shape != (probe.size(0), probe.size(1) // 2):
            return None
        gate = _recognize(probe, values, module)
        return gate if gate is not None and _has_gradient_of(gate, apply, probe) else None


def _numbers() -> Tensor:
    """[4, 128]: gates and ups, in halves or in pairs, that pass on both sides the limits in use
    (7 to 10, first row) and any other below float16's maximum (second row), and gates near 0 (the
    third in halves, the last in pairs)."""
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    near = torch.cat([torch.linspace(-13, 17, 64, **kind), torch.linspace(19, -15, 64, **kind)])
    # These signs go together in every way, in halves as in pairs.
    signs = torch.tensor([[1, 1, -1, -1], [1, -1, -1, 1]], **kind).repeat(1, 16)
    far = signs * torch.logspace(1.3, 4.8, 64, **kind)
    small = signs[0] * torch.logspace(-4, 0, 64, **kind)
    large = torch.full_like(small, 3.5)
    halves, pairs = torch.cat([small, large]), torch.stack([small, large], 1).flatten()
    return torch.stack([near, far.flatten(), halves, pairs])


def _gated(gate: Gate, gate_up: Tensor) -> Tensor:
    """[rows, I] of [rows, 2 I]: what the operator computes, by the usual functions."""
    if gate.interleaved:
        g, up = gate_up[:, ::2], gate_up[:, 1::2]
    else:
        g, up = gate_up.chunk(2, dim=-1)
    if gate.activation == "silu":
        return silu(g) * up
    if gate.activation == "clamped_silu":
        g = g.clamp(max=gate.limit)
        return g * torch.sigmoid(gate.alpha * g) * (up.clamp(-gate.limit, gate.limit) + 1)
    return gelu(g, approximate="tanh" if gate.activation == "gelu_tanh" else "none") * up


def _recognize(probe: Tensor, values: Tensor, module: nn.Module) -> Gate | None:
    alpha = number_of(module, ("alpha", "swiglu_alpha"), 1.702)
    limit = number_of(module, ("limit", "swiglu_limit"), 7.0)
    for interleaved in (False, True):
        for activation in ("silu", "gelu", "gelu_tanh", "clamped_silu"):
            gate = Gate(activation, interleaved, alpha, limit)
            if torch.allclose(values.float(), _gated(gate, probe), rtol=1e-5, atol=1e-6):
                return gate
    return None


def _has_gradient_of(gate: Gate, apply: Any, probe: Tensor) -> bool:
    """Whether the values are the same, too, where a gradient is asked for, and so is that: a gating
    may detach, have a backward of its own, or ask whether its input requires a gradient."""
    with torch.enable_grad():
        asked = probe.clone().requires_grad_()
        values = values_of(apply, asked)
        if values is None or not values.requires_grad:
            return False
        expected = _gated(gate, asked)
        if not torch.allclose(values.float(), expected, rtol=1e-5, atol=1e-6):
            return False
        weights = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float32, device="cpu")
        (wanted,) = torch.autograd.grad(expected, asked, weights.view_as(expected))
        try:
            (found,) = torch.autograd.grad(values, asked, weights.view_as(values).to(values.dtype))
        except Exception:
            return False
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def number_of(module: nn.Module, names: tuple[str, ...], default: float) -> float:
    """The first of these attributes of `module` that is a finite number, or the default."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return default
