"""The function that a class's forward is, below its decorators, and the same forward with another
one in its place."""

from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

_MOST_WRAPPERS = 5
_MISSING = object()


def own_function(kind: type[nn.Module]) -> Any:
    """The class's forward below its decorators."""
    function: Any = getattr(kind, "forward", None)
    for _ in range(_MOST_WRAPPERS):
        function = getattr(function, "__wrapped__", function)
    return function


def with_code(outer: Any, inner: FunctionType, code: CodeType) -> FunctionType | None:
    """`outer` with other code in `inner`, which it is or closes over, as decorators do; None if
    that is not how it comes to it."""
    return _with(outer, inner, _copy(inner, code, inner.__closure__))


def _with(
    outer: Any, inner: FunctionType, instead: FunctionType, depth: int = 0
) -> FunctionType | None:
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


def _full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not _MISSING
    except ValueError:
        return False
