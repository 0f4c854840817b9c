"""The forward of a module whose linear layers read one tensor: that of its own class, during which
the first of such layers to be called computes for all of them (`_sibling_calls.py`).

Which layers those are is known from the code (`_sibling_names.py`), so nothing is learned from
calls, with two exceptions, which are for the calls after: layers of which one was not called all
the same are not computed together again; and where the code views an output in a way that columns
of a larger tensor cannot be viewed in, they are copied apart. A recomputation (activation
checkpointing) does what was done in the call that it repeats.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ._fused_classes import FusedClasses, subclass
from ._linear import Linear
from ._merged import MergedLinear, merged
from ._mlp import differ, more_than_plain
from ._sibling_calls import Scope, local
from ._sibling_names import Names, sibling_names

NOTES = "fp8_siblings"
"""The attribute of a fused module that holds its Notes."""

_MARK = "_fp8_siblings_from"
_MOST = 4
"""Layers of a group: of more the operator would copy the weights together."""

_sequence_number: Any = torch._C._autograd._get_sequence_nr


class Notes:
    """What calls of one fused module have shown. A copy has notes of its own."""

    # No attributes in a dictionary: nothing that a module is recognized by (_probe.State).
    __slots__ = ("_known_groups", "_learned", "_waiting")

    def __init__(self) -> None:
        # Of which children and classes, and what; one tuple: threads replace all of it.
        self._known_groups: tuple[tuple[Any, ...], list[dict[str, nn.Linear]]] = ((), [])
        self._waiting: list[Any] = []  # what the next forward learns
        self._learned: list[tuple[int, Any]] = []  # since which node of the graph, and what

    def __reduce__(self) -> tuple[type["Notes"], tuple[()]]:
        return Notes, ()

    def groups(self, module: nn.Module, base: type[nn.Module]) -> list[dict[str, nn.Linear]]:
        """`groups_of` a module that has these notes, anew if its children are others."""
        kind: Any = base
        children = [module._modules.get(n) for names in sibling_names(kind) for n in names]
        inner = [child and child._modules.get("base_layer") for child in children]
        key = (*children, *map(type, children), *inner, *map(type, inner))
        before, groups = self._known_groups
        if key != before:
            groups = groups_of(module, base)
            self._known_groups = (key, groups)
        return groups

    def learn(self, what: Any) -> None:
        """From the next forward on that does not repeat another one."""
        if what not in [known for _, known in self._learned] and what not in self._waiting:
            self._waiting.append(what)

    def known(self) -> list[Any]:
        """What the calls before this one have shown; in a recomputation, those before the call
        that it repeats."""
        if not (self._waiting or self._learned):
            return []
        node = torch._C._current_autograd_node()
        if node is None:
            while self._waiting:
                self._learned.append((_sequence_number(), self._waiting.pop()))
            return [what for _, what in self._learned]
        return [what for since, what in self._learned if since <= node._sequence_nr()]

    def summary(self) -> list[Any]:
        """All of it."""
        return [*(what for _, what in self._learned), *self._waiting]


Notes.__module__, Notes.__qualname__ = "fp8.nn", "_SiblingNotes"  # what pickles name

APART = "apart"
"""In notes: outputs must be copied apart. Other notes are names of groups."""


_fused = FusedClasses(_MARK, lambda base: _make(base))
own_class, original, fused_class = _fused.own_class, _fused.original, _fused.fused_class


def fused_parent(base: type[nn.Module], *args: Any) -> nn.Module:
    """A fused module without attributes: what pickles and copies begin with."""
    return _fused.begin(base, *args)


fused_parent.__module__, fused_parent.__qualname__ = "fp8.nn", "_fused_parent"


def groups_of(
    module: nn.Module, base: type[nn.Module], kinds: tuple[type, ...] = (Linear,)
) -> list[dict[str, nn.Linear]]:
    """The linear layers of `module`, whose own class is `base`, that read one tensor, by name; of
    these classes."""
    found = []
    kind: Any = base
    for names in sibling_names(kind):
        layers: dict[str, nn.Linear] = {}
        for name in names:
            layer = _layer(module._modules.get(name), kinds)
            if layer is not None and all(layer is not other for other in layers.values()):
                layers[name] = layer
        items = list(layers.items())
        for start in range(0, len(items), _MOST):
            if len(part := dict(items[start : start + _MOST])) > 1:
                found.append(part)
    return found


def _layer(child: nn.Module | None, kinds: tuple[type, ...]) -> nn.Linear | None:
    """A child that is a linear layer, or the one that an adapter is put around (PEFT's LoRA)."""
    if type(child) not in kinds and child is not None:
        child = child._modules.get("base_layer")
    return child if type(child) in kinds else None  # type: ignore[return-value]


def obstacle(names: Names, layers: Sequence[nn.Linear], notes: Notes | None) -> str | None:
    """Why layers are not computed together, whatever they are called with; None if they are."""
    for name, layer in zip(names, layers, strict=True):
        why = more_than_plain(layer)
        if why is not None and type(getattr(layer, "weight", None)).__name__ != "DTensor":
            return f"{name} {why}"  # a sharded weight is whole when the module is called
    if (what := differ(layers)) is not None:
        return f"{' and '.join(names)} differ in {what}"
    if notes is not None and names in notes.summary():
        return f"one of {', '.join(names)} was not called with the others' input"
    return None


def joint_layers(module: nn.Module) -> list[list[nn.Linear]]:
    """The layers of a module that are computed as one, if its input lets them."""
    if isinstance(module, MergedLinear):
        groups = [{name: layer for name, layer in module._modules.items() if layer is not None}]
    else:
        base = own_class(type(module))
        groups = [] if base is None else groups_of(module, base)  # type: ignore[assignment]
    notes: Notes | None = vars(module).get(NOTES)
    found = []
    for group in groups:
        layers: Any = [*group.values()]
        if len(layers) > 1 and obstacle(tuple(group), layers, notes) is None:
            found.append(layers)
    return found


def can_read(x: Tensor, layers: Sequence[Any]) -> bool:
    """Whether nothing is copied together for it, and a write would be seen."""
    weights = [layer._parameters.get("weight") for layer in layers]
    if x.is_inference() or any(w is None or w.is_inference() for w in weights):
        return False  # they count no writes
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and x.dtype is not weights[0].dtype:
        return False
    if x.is_cpu:
        return True
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return dtype.itemsize == 2 and all(n % 8 == 0 for w in weights for n in w.shape)


def _merge(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor] | None:
    return merged(x, layers) if can_read(x, layers) else None


def _merge_apart(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor] | None:
    outputs = _merge(x, layers)
    return None if outputs is None else [output.contiguous() for output in outputs]


def _make(base: type[nn.Module]) -> type[nn.Module]:
    own: Callable[..., Any] = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or base.forward is not own:
            return base.forward(self, *args, **kwargs)
        notes: Notes | None = vars(self).get(NOTES)
        if notes is None:  # made of the class, by no conversion
            return base.forward(self, *args, **kwargs)
        known, all_groups = notes.known(), notes.groups(self, base)
        groups = [tuple(g.values()) for g in all_groups if not known or tuple(g) not in known]
        if not groups:
            return base.forward(self, *args, **kwargs)
        apart = APART in known
        scope = Scope(groups, _merge_apart if apart else _merge)
        try:
            result = _within(scope, base, self, args, kwargs)
        except RuntimeError as error:
            if apart or not scope.merged or "view size is not compatible" not in str(error):
                raise
            scope = Scope(groups, _merge_apart)
            result = _within(scope, base, self, args, kwargs)
            notes.learn(APART)
        for group in scope.in_vain():
            notes.learn(next(tuple(g) for g in all_groups if tuple(g.values()) == group))
        return result

    return subclass(base, _MARK, forward, fused_parent)


def _within(scope: Scope, base: type[nn.Module], module: Any, args: Any, kwargs: Any) -> Any:
    scope.outer, local.scope = local.scope, scope
    try:
        return base.forward(module, *args, **kwargs)
    finally:
        local.scope = scope.outer
