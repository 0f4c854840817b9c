"""The code of a forward in which sums of a residual stream and their norms are one call.

Written from its source (`_residual_places.py`), and only where that is what the code was compiled
from; lines and names stay.
"""

import ast
import copy
import functools
import inspect
import warnings
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple

from ._residual_places import Place, Writer
from ._sibling_names import blocks


ELSEWHERE = "its forward was not compiled from the source that is there"


class Rewritten(NamedTuple):
    """What became of a function."""

    code: CodeType | None  # None: it stays as it is
    places: tuple[Place, ...] = ()
    why: str | None = None  # it stays; None where nothing in it looks like a residual stream


def rewritten(code: CodeType) -> Rewritten:
    """The code of a forward with calls in place of residual sums and norms."""
    # File and name: equal code, of another class say, has places in the source of its own.
    return _rewritten(code, code.co_filename, code.co_qualname)


@functools.lru_cache(1024)
def _rewritten(code: CodeType, filename: str, qualname: str) -> Rewritten:
    try:
        lines, _ = inspect.findsource(code)
        tree = _parsed("".join(lines))
    except (OSError, SyntaxError, ValueError, TypeError, IndexError):
        return Rewritten(None, why="the source of its forward is not available")
    top = next((s for s in tree.body if _function(s, code) is not None), None)
    if top is None:
        return Rewritten(None, why=ELSEWHERE)
    first = Writer(copy.deepcopy(_function(top, code)))
    if not first.places:
        return Rewritten(None, why=first.why)
    imports = [*_imports(tree.body)]  # of which the compiler knows that they have no methods
    if _compiled([*imports, top], filename, code) != code:
        return Rewritten(None, why=ELSEWHERE)
    top = copy.deepcopy(top)
    writer = Writer(_function(top, code))
    new = _compiled([*imports, ast.fix_missing_locations(top)], filename, code)
    if new is None or new.co_freevars != code.co_freevars:
        return Rewritten(None, why="its forward closes over other variables once it is rewritten")
    return Rewritten(new, tuple(writer.places))


@functools.lru_cache(8)
def _parsed(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strings' escapes: said when the file was imported
        return ast.parse(text)


def _compiled(body: list[ast.stmt], filename: str, like: CodeType) -> CodeType | None:
    """The function that stands where `like` does, of these statements of its file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = compile(ast.Module(body, []), filename, "exec", dont_inherit=True)
    todo = [module]
    while todo:
        code = todo.pop()
        if (code.co_qualname, code.co_firstlineno) == (like.co_qualname, like.co_firstlineno):
            return code
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
    return None


def _imports(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of the file itself, whatever block they stand in."""
    for statement in statements:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for block in blocks(statement):
                yield from _imports(block)


def _function(statement: ast.stmt, code: CodeType) -> ast.FunctionDef | None:
    """The definition in the statement that `code` is of."""
    if not _first_line(statement) <= code.co_firstlineno <= (statement.end_lineno or 0):
        return None
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            if _first_line(node) == code.co_firstlineno:
                return node
    return None


def _first_line(statement: ast.stmt) -> int:
    """Its decorators', where it has some."""
    return min(node.lineno for node in (statement, *getattr(statement, "decorator_list", ())))
