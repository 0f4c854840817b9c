"""What a class's forward is made of: the names that its code reads, and what the class has under
them. A fused forward stands in for that code as long as nothing of it was replaced."""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

_CONSTANTS = (bool, int, float, str, tuple, type(None))


class Held(NamedTuple):
    """What a class, or one of its bases, has under a name."""

    kind: type
    name: str
    value: Any

    def same(self) -> bool:
        """Whether it still has."""
        now = getattr(self.kind, self.name, None)
        return now is self.value or (isinstance(now, _CONSTANTS) and bool(now == self.value))


def names_read(kind: type[nn.Module]) -> frozenset[str]:
    """All names in the code of its forward and of the methods that this names."""
    names: set[str] = set()
    todo, seen = ["forward"], {"forward"}
    while todo:
        method = todo.pop()
        for base in _bases(kind):
            for code in _codes(vars(base).get(method)):
                names.update(code.co_names)
        new = {n for n in names - seen if any(n in vars(base) for base in _bases(kind))}
        todo += new
        seen |= new
    return frozenset(names)


def held(kind: type[nn.Module], names: frozenset[str]) -> tuple[Held, ...]:
    """What the class and its bases below nn.Module have under these names, forward not counted
    where it is the class's own or inherited."""
    found = []
    for name in sorted(names | {"forward"}):
        bases = [base for base in _bases(kind) if name in vars(base)]
        for base in dict.fromkeys([kind, *bases] if bases else []):
            if (base, name) != (kind, "forward") and not _made_anew(base, name):
                found.append(Held(base, name, getattr(base, name)))
    return tuple(found)


def method_codes(
    kind: type[nn.Module], name: str, code_of: Callable[[Any], types.CodeType | None]
) -> Iterator[types.CodeType]:
    """The code of a method; of its overridden forms too, where it calls super(). code_of: of what a
    class has under the name; None: that cannot be read, and nothing below it is."""
    for base in kind.__mro__:
        if base in (nn.Module, object):
            return
        if name not in vars(base):
            continue
        code = code_of(vars(base)[name])
        if code is None:
            return
        yield code
        if "super" not in code.co_names:
            return


def _made_anew(kind: type, name: str) -> bool:
    """Whether each look at it makes another object, as of a classmethod."""
    return name.startswith("__") or getattr(kind, name) is not getattr(kind, name)


def _bases(kind: type) -> tuple[type, ...]:
    return tuple(base for base in kind.__mro__ if base not in (nn.Module, object))


def _codes(value: Any) -> Iterator[types.CodeType]:
    """That of a method, of what it wraps or closes over, and of functions in it."""
    if isinstance(value, property):
        yield from _codes(value.fget)
    function = getattr(value, "__func__", value)
    if not isinstance(function, types.FunctionType):
        return
    inner = [cell.cell_contents for cell in function.__closure__ or () if _full(cell)]
    for each in {f for f in [function, inspect.unwrap(function), *inner] if inspect.isfunction(f)}:
        todo = [each.__code__]
        while todo:
            code = todo.pop()
            yield code
            todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]


def _full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
