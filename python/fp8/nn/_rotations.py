"""A function that rotates q and k, what it computes as long as it is made of the same, and what
stands in for it."""

import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack as _transforms
from torch.autograd import forward_ad

from ._rope_probe import may_rotate, probe
from ._rope_spec import RopeSpec, rotated

PREFIX = "_fp8_rope_"
"""Of the names of stand-ins, in the globals of a model's file."""

_known: "weakref.WeakKeyDictionary[FunctionType, Rotation]" = weakref.WeakKeyDictionary()


class Rotation:
    """A function, and what it computes as long as it is made of the same."""

    def __init__(self, function: FunctionType) -> None:
        self.function = weakref.ref(function)
        self._code = function.__code__
        self._named = tuple(_named(function, set()))
        self.spec: RopeSpec | None = probe(function) if may_rotate(function) else None

    def unchanged(self) -> bool:
        """Whether the function has its code, and what it names is what it was."""
        function = self.function()
        return (
            function is not None
            and function.__code__ is self._code
            and all(have.get(name) is value for have, name, value in self._named)
        )


def rotation_of(function: FunctionType) -> Rotation:
    """What is known of the function, asked once."""
    found = _known.get(function)
    if found is None or not found.unchanged():
        found = _known[function] = Rotation(function)
    return found


def _named(function: FunctionType, seen: set[int]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The globals that it and the functions among them name, but for torch's."""
    seen.add(id(function))
    have = function.__globals__
    for name in {n for code in codes_of(function.__code__) for n in code.co_names} & have.keys():
        value = have[name]
        yield have, name, value
        inner = isinstance(value, FunctionType) and id(value) not in seen
        if inner and (value.__module__ or "").partition(".")[0] != "torch":
            yield from _named(value, seen)


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """It, and the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_of(constant)


def _template(*args: Any, _fp8_call: Any, **kwargs: Any) -> Any:
    return _fp8_call(_fp8_function, *args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


def stand_in(have: dict[str, Any], name: str, rotation: Rotation) -> FunctionType:
    """What the file has under the other name: it reads the function anew in each call, as the
    forward does, so that a compiler sees that it may change."""
    code = _template.__code__.replace(
        co_names=tuple(name if n == "_fp8_function" else n for n in _template.__code__.co_names),
        co_name=PREFIX + name,
    )
    made = FunctionType(code, have, PREFIX + name)
    function = have[name]
    made.__kwdefaults__ = {"_fp8_call": _call_of(function, rotation)}
    made.__module__, made.__qualname__ = have.get("__name__", __name__), PREFIX + name
    vars(made).update(_fp8_rotation=rotation, _fp8_function=function)
    return made


def _call_of(recognized: FunctionType, rotation: Rotation) -> Callable[..., Any]:
    """f(function, ...): function(...), by the operator if it is the one that was recognized."""
    spec = rotation.spec
    assert spec is not None
    defaults = dict(spec.defaults)
    tensors = tuple(name for name in (spec.q, spec.k, spec.cos, spec.sin) if name is not None)
    others = tuple(name for name in defaults if name not in tensors and name != spec.axis)

    def unchanged() -> bool:
        return rotation.unchanged()

    # What torch.compiler.assume_constant_result sets: asked outside of a trace. That the file has
    # the same function under the name, a trace depends on.
    unchanged._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if function is recognized and unchanged():
            result = run(args, kwargs)
            if result is not None:
                return result
        return function(*args, **kwargs)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > len(spec.names):
            return None
        given = dict(zip(spec.names, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in spec.names:
                return None
            given[name] = value
        for name in tensors:
            if name not in given:
                return None  # it says what is missing
        for name in others:
            if name in given and given[name] is not defaults[name]:
                return None
        if not torch.compiler.is_compiling() and _transformed():
            return None
        k = None if spec.k is None else given[spec.k]
        axis = None if spec.axis is None else given.get(spec.axis, defaults[spec.axis])
        return rotated(spec, given[spec.q], k, given[spec.cos], given[spec.sin], axis)

    return call


def _transformed() -> bool:
    """Whether torch.func or forward-mode AD look on, whose rules the operators do not have."""
    return _transforms() is not None or forward_ad._current_level >= 0
