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
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ._fused_classes import base_of, made_from, put_below, subclass, taken_out
from ._own_forward import own_function, with_code
from ._rope_probe import may_rotate
from ._rotations import PREFIX, Rotation, codes_of, rotation_of, stand_in

_MARK = "_fp8_rope_from"

_classes: dict[tuple[Any, ...], type[nn.Module]] = {}


def original(kind: type) -> type[nn.Module] | None:
    """The class that a fused class was made from; None for any other."""
    return made_from(kind, _MARK)


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
    for each in codes_of(code):
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
            have[PREFIX + name] = stand_in(have, name, rotation)
    result: type[nn.Module] = kind
    return result


def with_stand_ins(kind: type[nn.Module]) -> type[nn.Module]:
    """What a module of this class takes: below what else is fused of it, a class whose forward
    calls stand-ins."""
    return put_below(kind, _MARK, rotating_class)


def without_stand_ins(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The same backwards; None if there is no such class below what is fused."""
    return taken_out(kind, _MARK)


def rotating_module(base: type[nn.Module], *args: Any) -> nn.Module:
    """A fused module without attributes: what pickles and copies begin with."""
    kind: Any = rotating_class(base)
    module: nn.Module = kind.__new__(kind, *args)
    return module


rotating_module.__module__, rotating_module.__qualname__ = "fp8.nn", "_rotating_module"


def obstacle(base: type[nn.Module]) -> str | None:
    """Why no such class can be made; None if it can."""
    own = own_function(base)
    if with_code(base.forward, own, own.__code__) is None:
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
    rotating = with_code(own, function, code) or own

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
