"""The forward of a module that rotates q and k by a function of its model's file, in place of which
it calls the fused operator where nothing is in the way.

Such a module has a subclass of its class, whose forward is the class's own code, but that it reads
the function under another name: `_fp8_rope_` and its own. That name is added to the globals of the
file; there it belongs to a stand-in, which looks what the file has under the function's own name
and calls that, unless it is what was recognized, unchanged. So nothing that exists is replaced:
other modules of the class call what they did, all other globals stay live, and a patch of the
function made later is respected.
"""

import dis
import functools
import weakref
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack as _transforms
from torch.autograd import forward_ad

from ._fused_classes import base_of, made_from, remade, subclass
from ._rope_probe import may_rotate, probe
from ._rope_spec import RopeSpec, rotated

PREFIX = "_fp8_rope_"
_MARK = "_fp8_rope_from"
_MOST_WRAPPERS = 5
_MISSING = object()

_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
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
    for name in {n for code in _codes(function.__code__) for n in code.co_names} & have.keys():
        value = have[name]
        yield have, name, value
        inner = isinstance(value, FunctionType) and id(value) not in seen
        if inner and (value.__module__ or "").partition(".")[0] != "torch":
            yield from _named(value, seen)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """It, and the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def original(kind: type) -> type[nn.Module] | None:
    """The class that a fused class was made from; None for any other."""
    return made_from(kind, _MARK)


def own_function(kind: type[nn.Module]) -> Any:
    """The class's forward below its decorators."""
    function: Any = kind.forward
    for _ in range(_MOST_WRAPPERS):
        function = getattr(function, "__wrapped__", function)
    return function


def rotations(kind: type[nn.Module]) -> dict[str, Rotation]:
    """By their names, the functions that the class's forward calls and that were asked."""
    function = own_function(kind)
    if not isinstance(function, FunctionType) or (kind.__module__ or "").startswith("torch.nn."):
        return {}
    if any(base_of(base) is not None for base in kind.__mro__):
        return {}  # made of a fused class
    found = {}
    for name in _called(function.__code__):
        value = function.__globals__.get(name)
        if type(value) is FunctionType and may_rotate(value):
            found[name] = rotation_of(value)
    return found


@functools.lru_cache(4096)
def _called(code: CodeType) -> tuple[str, ...]:
    """Names of globals that are nothing but that in the code."""
    kinds: dict[str, set[bool]] = {}
    for each in _codes(code):
        for instruction in dis.get_instructions(each):
            if instruction.opcode in dis.hasname:
                is_global = instruction.opname == "LOAD_GLOBAL"
                kinds.setdefault(instruction.argval, set()).add(is_global)
    return tuple(sorted(name for name, of in kinds.items() if of == {True}))


def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose forward calls stand-ins, for the forward that `base` has now."""
    names = tuple(sorted(n for n, found in rotations(base).items() if found.spec is not None))
    key = (base, base.forward, names)
    if key not in _classes:
        _classes[key] = _make(base, names)
    return _classes[key]


def rotating_class(base: type[nn.Module]) -> type[nn.Module]:
    """The same, to be used: the stand-ins are there."""
    kind: Any = fused_class(base)
    have = own_function(base).__globals__ if kind._fp8_rotations else {}
    for name in kind._fp8_rotations:
        rotation = rotation_of(have[name])
        if getattr(have.get(PREFIX + name), "_fp8_rotation", None) is not rotation:
            have[PREFIX + name] = _stand_in(have, name, rotation)
    result: type[nn.Module] = kind
    return result


def with_stand_ins(kind: type[nn.Module]) -> type[nn.Module]:
    """What a module of this class takes: below what else is fused of it, which calls the forward of
    the class that it is made of, a class whose forward calls stand-ins."""
    base = base_of(kind)
    if base is None:
        return rotating_class(kind)
    return rotating_class(base) if original(kind) else remade(kind, with_stand_ins(base))


def without_stand_ins(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The same backwards; None if there is no such class below what is fused."""
    base = base_of(kind)
    if base is None or original(kind):
        return base
    below = without_stand_ins(base)
    return None if below is None else remade(kind, below)


def rotating_module(base: type[nn.Module], *args: Any) -> nn.Module:
    """A fused module without attributes: what pickles and copies begin with."""
    kind: Any = rotating_class(base)
    module: nn.Module = kind.__new__(kind, *args)
    return module


rotating_module.__module__, rotating_module.__qualname__ = "fp8.nn", "_rotating_module"


def obstacle(base: type[nn.Module]) -> str | None:
    """Why no such class can be made; None if it can."""
    own = own_function(base)
    if _with(base.forward, own, own) is None:
        return "its forward is decorated by more than functions"
    return None


def stale(kind: Any) -> str | None:
    """Why modules of a fused class run what the class's own do; None if they do not."""
    base: Any = original(kind)
    if base.forward is not kind._fp8_own:
        return "its class's forward was replaced"
    if not kind._fp8_rotations:
        return "its class's forward calls no rotation that is known now"
    have = own_function(base).__globals__
    for name in kind._fp8_rotations:
        stand_in: Any = have.get(PREFIX + name)
        if stand_in is None or have.get(name) is not stand_in._fp8_function:
            return f"{name} was replaced"
        if not stand_in._fp8_rotation.unchanged():
            return f"what {name} calls was replaced"
    return None


def _make(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    own: Callable[..., Any] = base.forward
    function = own_function(base)
    code = _renamed(function.__code__, {name: PREFIX + name for name in names})
    rotating = _with(own, function, _copy(function, code, function.__closure__)) or own

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if base.forward is own:
            return rotating(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    about = {"_fp8_own": staticmethod(own), "_fp8_rotations": names}
    return subclass(base, _MARK, forward, rotating_module, **about)


def _renamed(code: CodeType, names: dict[str, str]) -> CodeType:
    """The same code, reading globals under other names."""
    return code.replace(
        co_names=tuple(names.get(name, name) for name in code.co_names),
        co_consts=tuple(
            _renamed(value, names) if isinstance(value, CodeType) else value
            for value in code.co_consts
        ),
    )


def _copy(
    function: FunctionType, code: CodeType, closure: tuple[CellType, ...] | None
) -> FunctionType:
    made = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    made.__module__, made.__qualname__ = function.__module__, function.__qualname__
    return made


def _with(
    outer: Any, inner: FunctionType, instead: FunctionType, depth: int = 0
) -> FunctionType | None:
    """`outer` with another function instead of `inner`, which it is or closes over, as decorators
    do; None if that is not how it comes to it."""
    if outer is inner:
        return instead
    if type(outer) is not FunctionType or depth > _MOST_WRAPPERS:
        return None
    cells, changed = [], False
    for cell in outer.__closure__ or ():
        value = cell.cell_contents if _full(cell) else None
        other = _with(value, inner, instead, depth + 1)
        changed = changed or other is not None
        cells.append(cell if other is None else CellType(other))
    if not changed:
        return None
    made = _copy(outer, outer.__code__, tuple(cells))
    if hasattr(outer, "__wrapped__"):
        made.__wrapped__ = _with(outer.__wrapped__, inner, instead, depth + 1)  # type: ignore[attr-defined]
    return made


def _full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not _MISSING
    except ValueError:
        return False


def _template(*args: Any, _fp8_call: Any, **kwargs: Any) -> Any:
    return _fp8_call(_fp8_function, *args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


def _stand_in(have: dict[str, Any], name: str, rotation: Rotation) -> FunctionType:
    """What the file has under the other name: it reads the function anew in each call, as the
    forward does, so that a compiler sees that it may change."""
    code = _template.__code__.replace(
        co_names=tuple(name if n == "_fp8_function" else n for n in _template.__code__.co_names),
        co_name=PREFIX + name,
        co_qualname=PREFIX + name,
    )
    made = FunctionType(code, have, PREFIX + name)
    function = have[name]
    made.__kwdefaults__ = {"_fp8_call": _call_of(function, rotation)}
    made.__module__ = have.get("__name__", __name__)
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
