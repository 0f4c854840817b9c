"""Which linear layers of a module get the same tensor, by the code of its forward.

`self.q(x)` and `self.k(x)` with nothing between them that could leave the block or make x another
object: whenever one is called, so is the other, with the same tensor. Read from the source, before
anything has run, so that what is computed does not depend on how many calls there were before. What
is not written that way (in loops, in branches, by other names) is not found.
"""

import ast
import functools
import inspect
import textwrap
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

Names = tuple[str, ...]

_NOT_ALWAYS = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp)
_APART = (*_NOT_ALWAYS, ast.GeneratorExp, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_BODIES = (ast.stmt, ast.ExceptHandler, ast.match_case)
_LEAVES = (ast.Return, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom, ast.Await)


@functools.cache
def sibling_names(kind: type[nn.Module]) -> tuple[Names, ...]:
    """Groups of names of children, each in the order of the calls, by the forward of `kind` and the
    methods that it reaches.

    Two names are in one group if the code never calls one without the other.
    """
    calls: list[Names] = []
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        for code in _codes(kind, waiting.pop()):
            found, methods = _calls_of(code)
            calls += found
            new = {name for name in methods - seen if inspect.isfunction(_attribute(kind, name))}
            seen |= new
            waiting += sorted(new)
    places: dict[str, list[int]] = defaultdict(list)
    for place, names in enumerate(calls):
        for name in names:
            places[name].append(place)
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, where in places.items():
        groups[tuple(where)].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _attribute(kind: type, name: str) -> Any:
    return inspect.unwrap(found) if callable(found := getattr(kind, name, None)) else None


def _codes(kind: type[nn.Module], name: str) -> Iterator[types.CodeType]:
    """Of a method below its decorators; its overridden forms too, where it calls super()."""
    for base in kind.__mro__:
        if base in (nn.Module, object):
            return
        if name not in vars(base):
            continue
        function = vars(base)[name]
        function = inspect.unwrap(function) if callable(function) else None
        if not inspect.isfunction(function):
            return
        yield function.__code__
        if "super" not in function.__code__.co_names:
            return


@functools.lru_cache(1024)
def _calls_of(code: types.CodeType) -> tuple[tuple[Names, ...], frozenset[str]]:
    """Children that a function calls together, or alone; and the names that it reads of self."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, ValueError, TypeError):  # no source, or no function of its own
        return (), frozenset()
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return (), frozenset()
    reader = _Reader(function.args.args[0].arg)
    reader.block(function.body)
    names = {reader.attribute_of_self(node) for node in ast.walk(function)} - {""}
    return tuple(reader.calls), frozenset(names)


class _Reader:
    """Goes through the statements of a function in order."""

    def __init__(self, self_name: str) -> None:
        self.self_name = self_name
        self.calls: list[Names] = []

    def attribute_of_self(self, node: ast.AST) -> str:
        """The name of an attribute of self; "" for anything else."""
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return ""
        return node.attr if node.value.id == self.self_name else ""

    def block(self, statements: list[ast.stmt]) -> None:
        """Statements that run one after the other."""
        together: dict[str, list[str]] = defaultdict(list)  # by the variable that they are given

        def end(variables: Any) -> None:
            for variable in list(variables):
                if names := together.pop(variable, None):
                    self.calls.append(tuple(dict.fromkeys(names)))

        for statement in statements:
            inner = blocks(statement)
            if inner:
                for head in ast.iter_child_nodes(statement):
                    if not isinstance(head, _BODIES):
                        self.expression(head, together)
            else:
                self.expression(statement, together)
            end(written(statement))
            for part in inner:
                self.block(part)
            if any(isinstance(node, _LEAVES) for node in ast.walk(statement)):
                end(together)
        end(together)

    def expression(self, node: ast.AST, together: dict[str, list[str]], sure: bool = True) -> None:
        """Notes the calls in it, inner ones first, as they are made."""
        sure = sure and not isinstance(node, _APART)
        for child in ast.iter_child_nodes(node):
            self.expression(child, together, sure)
        name = self.attribute_of_self(node.func) if isinstance(node, ast.Call) else ""
        if not isinstance(node, ast.Call) or not name:
            return
        given = node.args[0] if len(node.args) == 1 and not node.keywords else None
        if sure and isinstance(given, ast.Name):
            together[given.id].append(name)
        else:
            self.calls.append((name,))


def blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """The blocks of a statement that has some."""
    found = []
    for name in ("body", "orelse", "finalbody"):
        if block := getattr(statement, name, None):
            found.append(block)
    for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
        found.append(part.body)
    return found


def written(statement: ast.stmt) -> set[str]:
    """Variables that stand for something else after it, or may."""
    nodes = list(ast.walk(statement))
    names = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    names |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.Global | ast.Nonlocal):
            names |= set(node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
    return names
