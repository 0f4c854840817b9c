"""`fp8.numerics`: how well FP8 holds the tensors of each layer, watched while a model runs.

Two modes of PyTorch's dispatcher look on while the context is open, and nothing does while it is
not: no hook is registered, so fusions stay what they are, and no layer asks whether it is watched.

    _Calls, above autograd, sees what modules call: it knows the weights by their names, before
        autocast, and leaves them on the node of the graph for the backward. Backwards, and what
        checkpointing runs again in one, are past it;
    _Operators, below autograd, sees what runs, forward, backward and recomputed, with the tensors
        that are quantized; _observations.py says what that means for an operator.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn._watched import WatchedParameter
from . import _observations as observations
from ._numerics_report import Numerics, layers_of
from ._numerics_sums import Sums

_cast = torch.ops.aten._to_copy.default
_PLAIN = (Tensor, nn.Parameter, WatchedParameter)


@contextmanager
def numerics(model: nn.Module) -> Iterator[Numerics]:
    """Inside the context, measure what quantization does to each layer's x, weight and dy.

    Covered are `fp8.Linear`, `MergedLinear`, `GroupedLinear`, `GatedMLP`, `MLP`, whatever
    `fp8.convert` fused of them, and experts, as far as `Numerics.notes` says: each operand as a
    product reads it, with the layer's own recipe, format and scale (dynamic, static or delayed),
    quantized by fp8's operators. Outputs and gradients are those without the context, bit for bit.

    The figures of a call are

    - `amax`: the largest |v| of finite values v;
    - `sqnr_db`: 10 · log10(Σ v² / Σ (v - decoded)²), the signal-to-quantization-noise ratio;
    - `saturated`: the share of elements that lie beyond the largest code, by more than half a step;
    - `flushed`: the share of the non-zero elements whose code is 0;
    - `nonfinite`: how many elements are NaN or Inf.

    A forward that activation checkpointing runs again is one call. Works with autocast, frozen
    weights, gradient accumulation, cached weights, main_grad, DDP and FSDP2; what torch.compile
    compiled before is watched too, and what it meets first inside runs uncompiled there. Nothing
    waits for the GPU before the end. It costs a second quantization and some passes over every
    operand, and Python's time for every operator of PyTorch: meant for some steps of a training,
    not for all. Where processes work together each has its own figures.

    Args:
        model: a module with layers in FP8. Its parameters name the layers; a weight that is no
            parameter of it (parametrized, or another model's) is not measured.

    Yields a `Numerics`, filled when the context ends, by an exception too.

    Raises TypeError if `model` is no nn.Module.

    Example:
        >>> with fp8.numerics(model) as found:
        ...     for batch in micro_batches:
        ...         loss(model(batch)).backward()
        >>> print(found.table())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fp8.numerics: expected a torch.nn.Module, got {type(model).__name__}")
    found = Numerics()
    sums = Sums()
    watcher = _Watcher(model, sums)
    try:
        with _Calls(watcher), _Operators(watcher):
            yield found
    finally:
        found._fill(sums.rows(), layers_of(model))


class _Local(threading.local):
    names: observations.Names | None = None
    """Of the weights of the call that is running."""


class _Thread(threading.local):
    measuring = False
    """Operators that run are those of a measurement, by whichever context."""


_thread = _Thread()


class _Watcher:
    """What the two modes share."""

    def __init__(self, model: nn.Module, sums: Sums) -> None:
        self.sums = sums
        self.local = _Local()
        self._model = model
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # by id
        self._note = f"fp8.numerics {id(self)}"
        self._find_names()

    def _find_names(self) -> None:
        for name, parameter in self._model.named_parameters():
            layer = "(model)" if name == "weight" else name.removesuffix(".weight")
            self._names[id(parameter)] = (weakref.ref(parameter), layer)

    def name_of(self, weight: Tensor | None) -> str | None:
        """Of the layer; None for a tensor that is no parameter of the model."""
        for tensor in () if weight is None else (weight, weight._base):
            for _ in range(2 if tensor is not None else 0):
                known = self._names.get(id(tensor))
                if known is not None and known[0]() is tensor:
                    return known[1]
                self._find_names()  # FSDP2 puts another parameter there for a forward
        return None

    def follow(self, weight: Tensor, cast: Tensor) -> None:
        """A cast of a weight has its name, as long as it lives."""
        known = self._names.get(id(weight))
        if known is not None and known[0]() is weight:
            self._names[id(cast)] = (weakref.ref(cast), known[1])

    def names_of(
        self, arguments: Mapping[str, Any], weights: tuple[str, ...]
    ) -> observations.Names:
        """Of an operator's weights, those left out that it was not given."""
        names: list[str | None] = []
        for argument in weights:
            value = arguments[argument]
            if value is not None:
                names += map(self.name_of, value if isinstance(value, list | tuple) else [value])
        return names

    def leave_names(self, result: Any, names: observations.Names) -> None:
        """On the node of the graph that the call made."""
        outputs = result if isinstance(result, list | tuple) else [result]
        nodes: list[Any] = [y.grad_fn for y in outputs if isinstance(y, Tensor)]
        for node in nodes[:1]:
            if node is not None:
                node.metadata[self._note] = tuple(names)

    def names_left(self) -> observations.Names | None:
        """Those on the node whose backward is running."""
        node: Any = torch._C._current_autograd_node()
        return None if node is None else node.metadata.get(self._note)


class _Calls(TorchFunctionMode):
    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self._watcher = watcher

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        weights = observations.PUBLIC.get(function)
        if weights is None:
            return function(*args, **(kwargs or {}))
        watcher = self._watcher
        names = watcher.names_of(_bound(function, args, kwargs or {}), weights)
        before, watcher.local.names = watcher.local.names, names
        try:
            result = function(*args, **(kwargs or {}))
        finally:
            watcher.local.names = before
        watcher.leave_names(result, names)
        return result


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watcher = watcher

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = observations.BELOW_AUTOGRAD.get(function)
        if found is None or _thread.measuring:
            result = function(*args, **(kwargs or {}))
            if function is _cast:
                self._watcher.follow(args[0], result)
            return result
        arguments = _bound(function, args, kwargs or {})
        tensors = _tensors(arguments)
        result = function(*args, **(kwargs or {}))
        if all(type(t) in _PLAIN and not t.is_meta for t in tensors):
            self._observe(found, arguments, result)
        return result

    def _observe(self, found: Any, arguments: dict[str, Any], result: Any) -> None:
        observe, weights = found
        watcher = self._watcher
        node: Any = torch._C._current_autograd_node()
        backward = "dy" in arguments or "dys" in arguments
        names = watcher.names_left() if backward else watcher.local.names
        if names is None or len(arguments.get("dys", names)) != len(names):
            names = watcher.names_of(arguments, weights)
        if not any(names) or len(arguments.get("dys", names)) != len(names):
            return
        again = node is not None and not backward
        late = again and node.name() == "CheckpointFunctionBackward"
        ran = observations.Ran(arguments, result, names, again, late)
        device = _tensors(arguments)[0].device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            _thread.measuring = True
            try:
                observe(ran, watcher.sums.add)
            finally:
                _thread.measuring = False


def _tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    lists = [v if isinstance(v, list | tuple) else [v] for v in arguments.values()]
    return [value for values in lists for value in values if isinstance(value, Tensor)]


def _bound(function: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of an operator by its name, those that were left out included."""
    schema = function._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema}
    bound.update(zip((argument.name for argument in schema), args, strict=False))
    bound.update(kwargs)
    return bound
