"""The forward of a layer whose residual sums `fp8.convert` fused with the norms that read them: the
class's own code, rewritten (`_residual_places.py`) so that it calls the methods below.

They look in each call whether the norm is one that runs a fused operator on what it is given, and
do what the author wrote where it does not. So nothing is kept in the module; what is fused depends
on its norms alone. In compiled code, the class's own forward runs: a compiler sees sums and norms
by itself.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ._calls import called_through
from ._fused_classes import base_of, made_from, put_below, subclass, taken_out
from ._fused_norms import LAYER, NormSpec, fused_spec, parameter_of
from ._fused_norms import SPEC as NORM_SPEC
from ._fused_norms import original as norms_class
from ._fused_norms import stale as stale_norm
from ._own_forward import own_function, with_code
from ._residual_code import rewritten
from ._residual_places import ADD, PASS, Place

_add_rms_norm = torch.ops.fp8.add_rms_norm.default
_norm_and_input = torch.ops.fp8._norm_and_input.default
_FORMS = ("scale_then_round", "round_then_scale", "scale_by_one_plus", LAYER)
"""As core::NormForm counts them."""

_MARK = "_fp8_residual_from"

_classes: dict[tuple[Any, ...], type[nn.Module]] = {}


def original(kind: type) -> type[nn.Module] | None:
    """The class that a fused class was made from; None for any other."""
    return made_from(kind, _MARK)


class _Look(NamedTuple):
    """What the forward of a class comes to."""

    forward: Callable[..., Any] | None = None  # rewritten
    places: tuple[Place, ...] = ()
    why: str | None = None  # there is none; None where there is nothing to rewrite


def _look(kind: type[nn.Module]) -> _Look:
    function = own_function(kind)
    if base_of(kind) is not None:
        return _Look(why="its forward was changed for another fusion")
    if not isinstance(function, FunctionType) or kind.__module__.startswith("torch.nn."):
        return _Look()
    found = rewritten(function.__code__)
    if found.code is None:
        return _Look(why=found.why)
    made = with_code(kind.forward, function, found.code)
    if made is None:
        return _Look(why="its forward is decorated by more than functions")
    return _Look(made, found.places)


def places(kind: type[nn.Module]) -> tuple[Place, ...]:
    """Where the forward of `kind`, a class that is not fused, calls children on a stream."""
    return _look(kind).places


def obstacle(kind: type[nn.Module]) -> str | None:
    """Why the forward of `kind` cannot be rewritten; None if it can, or has nothing to rewrite."""
    return _look(kind).why


def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose forward is rewritten, for the forward that `base` has now."""
    key = (base, base.forward, getattr(own_function(base), "__code__", None))
    if key not in _classes:
        _classes[key] = _make(base)
    return _classes[key]


def with_residuals(kind: type[nn.Module]) -> type[nn.Module]:
    """What a module of this class takes: below what else is fused of it, such a class."""
    return put_below(kind, _MARK, fused_class)


def without_residuals(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The same backwards; None if there is no such class below what is fused."""
    return taken_out(kind, _MARK)


def residual_layer(base: type[nn.Module], *args: Any) -> nn.Module:
    """A fused module without attributes: what pickles and copies begin with."""
    kind: Any = fused_class(base)
    module: nn.Module = kind.__new__(kind, *args)
    return module


residual_layer.__module__, residual_layer.__qualname__ = "fp8.nn", "_residual_layer"


def stale(module: nn.Module, kind: Any) -> str | None:
    """Why no sum in a module of a fused class is fused, whatever it is given; None if one is."""
    base: Any = original(kind)
    if not kind._fp8_intact():
        return "its class's forward was replaced"
    why = [norm_obstacle(module, place) for place in places(base)]
    return None if None in why else next(iter(why), obstacle(base))


def norm_obstacle(module: nn.Module, place: Place) -> str | None:
    """Why the norm of a place is not fused with the sum that it reads, whatever that is."""
    norm = getattr(module, place.name, None)
    if not isinstance(norm, nn.Module) or norms_class(type(norm)) is None:
        return f"{place.name} is not fused"
    if (why := called_through(norm)) is not None:
        return f"{place.name} {why}"
    why = stale_norm(norm)
    return None if why is None else f"{place.name} is not fused: {why}"


def _make(base: type[nn.Module]) -> type[nn.Module]:
    own: Callable[..., Any] = base.forward
    function = own_function(base)
    code = getattr(function, "__code__", None)
    made = _look(base).forward or own

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or not intact():
            return base.forward(self, *args, **kwargs)
        return made(self, *args, **kwargs)

    def intact() -> bool:
        return base.forward is own and getattr(function, "__code__", None) is code

    methods: dict[str, Any] = {ADD: _add_norm, PASS: _norm, "_fp8_intact": staticmethod(intact)}
    return subclass(base, _MARK, forward, residual_layer, **methods)


def _add_norm(self: Any, name: str, a: Any, b: Any) -> tuple[list[Tensor], Any]:
    """The norm of that name of a + b, in a list, and the sum; an empty list where the class's own
    code norms it."""
    norm = getattr(self, name, None)
    alike = type(a) is Tensor and type(b) is Tensor and a.dtype is b.dtype and a.shape == b.shape
    if norms_class(type(norm)) is None or not alike or a.device != b.device:
        return [], a + b
    known: NormSpec | None = vars(norm).get(NORM_SPEC)
    if known is not None and known.form == LAYER:  # which has no sum of its own, but joins
        return _norm(self, name, a + b)
    spec = fused_spec(norm, a) if b.layout is torch.strided and b.is_contiguous() else None
    if spec is None:
        return [], a + b
    y, total = _add_rms_norm(a, b, _parameter(norm, spec.weight), spec.eps, spec.form)
    return [y], total


def _norm(self: Any, name: str, x: Any) -> tuple[list[Tensor], Any]:
    """The norm of that name of x, in a list, and x for its other uses, whose gradient joins that of
    the norm in its pass; an empty list where the class's own code norms it."""
    norm = getattr(self, name, None)
    if norms_class(type(norm)) is None or type(x) is not Tensor:
        return [], x
    if not x.requires_grad or not torch.is_grad_enabled():
        return [], x
    spec = fused_spec(norm, x)
    if spec is None or (spec.form == LAYER and torch.is_autocast_enabled(x.device.type)):
        return [], x  # autocast would cast x for LayerNorm, and not for its other uses
    weight, bias = _parameter(norm, spec.weight), _parameter(norm, spec.bias)
    y, same = _norm_and_input(x, weight, bias, spec.eps, _FORMS.index(spec.form))
    return [y], same


def _parameter(norm: nn.Module, name: str | None) -> Any:
    return None if name is None else parameter_of(norm, name)
