"""What a fused parent and its layers say to each other during one call of the parent.

The first of several layers that is called computes for all of them, and each of the others takes
what is its own when it is called: if it is given the same tensor, which nobody has written since,
in the same modes of autograd and autocast, and its own parameters are what they were. Else it
computes alone. Nothing outlives the call of the parent, and no other thread sees it.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Merge = Callable[[Tensor, Sequence[Any]], Sequence[Tensor] | None]


class _Ready(NamedTuple):
    """The output of a layer that has not asked for it yet, and what it was made of."""

    output: Tensor
    x: Tensor
    modes: tuple[Any, ...]
    layer: tuple[Any, ...]


class Scope:
    """One call of a parent."""

    __slots__ = ("_groups", "_merge", "_ready", "_refused", "_started", "outer")

    def __init__(self, groups: Sequence[Sequence[nn.Module]], merge: Merge) -> None:
        self._groups = {layer: group for group in groups for layer in group}
        self._merge = merge
        self._ready: dict[nn.Module, _Ready] = {}
        self._refused: list[nn.Module] = []  # that computed alone although there was an output
        self._started: list[Sequence[nn.Module]] = []
        self.outer: Scope | None = None

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """What `layer` computes of x, where it is or can be computed with its siblings."""
        group = self._groups.get(layer)
        if group is None or type(x) is not Tensor:
            return None
        ready = self._ready.pop(layer, None)
        if ready is not None:
            if x is ready.x and _modes(x) == ready.modes and _same(_state(layer), ready.layer):
                return ready.output
            self._refused.append(layer)
            return None
        if any(group is started for started in self._started):
            return None
        self._started.append(group)
        outputs = self._merge(x, group)
        if outputs is None:
            return None
        own: Tensor | None = None
        modes = _modes(x)
        for sibling, output in zip(group, outputs, strict=True):
            if sibling is layer:
                own = output
            else:
                self._ready[sibling] = _Ready(output, x, modes, _state(sibling))
        return own

    @property
    def merged(self) -> bool:
        """Whether layers were computed together."""
        return bool(self._started)

    def in_vain(self) -> list[Sequence[nn.Module]]:
        """Groups of which an output was computed that its layer did not take."""
        left = {*self._ready, *self._refused}
        return [group for group in self._started if any(layer in left for layer in group)]


class _Local(threading.local):
    scope: Scope | None = None


local = _Local()
"""The innermost call of a fused parent on this thread."""


def _modes(x: Tensor) -> tuple[Any, ...]:
    """Of x, which is no tensor of inference mode, and of what it is given to."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return x._version, torch.is_grad_enabled(), dtype


def _state(layer: Any) -> tuple[Any, ...]:
    """What a layer computes with."""
    parameters = layer._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    state = (weight, weight._version, weight.requires_grad, layer.recipe, bias)
    return state if bias is None else (*state, bias._version, bias.requires_grad)


def _same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """Tensors by identity."""
    return len(now) == len(before) and all(
        a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(now, before, strict=True)
    )
