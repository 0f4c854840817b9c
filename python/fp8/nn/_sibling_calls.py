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
    made_of: tuple[Any, ...]


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
            if _same(ready.made_of, _made_of(layer, x)):
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
        for sibling, output in zip(group, outputs, strict=True):
            if sibling is layer:
                own = output
            else:
                self._ready[sibling] = _Ready(output, _made_of(sibling, x))
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


def _made_of(layer: Any, x: Tensor) -> tuple[Any, ...]:
    """What must be the same for an output to be that of x still."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    parts: list[Any] = [
        x,
        _version(x),
        torch.is_grad_enabled(),
        autocast and torch.get_autocast_dtype(device),
        layer.recipe,
    ]
    for name in ("weight", "bias"):
        parameter = layer._parameters.get(name)
        parts += [parameter]
        if parameter is not None:
            parts += [_version(parameter), parameter.requires_grad]
    return tuple(parts)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Tensors by identity."""
    return len(before) == len(now) and all(
        a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
        for a, b in zip(before, now, strict=True)
    )
