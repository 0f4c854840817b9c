"""Where a forward adds to a residual stream and norms the sum, rewritten as one call.

    h = residual + h          _fp8_y, h = self._fp8_add_norm("norm", residual, h)
    residual = h              residual = h
    h = self.norm(h)          h = _fp8_y.pop() if _fp8_y else self.norm(h)

Between sum and norm stand nothing but copies of variables, so the norm may be computed with the
sum. Where the call leaves no y, what runs is what the author wrote, statement by statement: so a
child that is no norm does no harm. And where a stream that comes from elsewhere is normed and added
to later, whose gradients are then joined in the norm's pass:

    residual = h              residual = h
    h = self.norm(h)          _fp8_y, residual = self._fp8_norm("norm", h)
    ..                        h = _fp8_y.pop() if _fp8_y else self.norm(h)
    h = residual + h          ..
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from ._sibling_names import blocks, written

ADD, PASS = "_fp8_add_norm", "_fp8_norm"
"""Methods of self that the rewritten code calls."""

_Y = "_fp8_y"
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_AGAIN = (*_SCOPES, *_COMPREHENSIONS, ast.For, ast.AsyncFor, ast.While)  # may run more than once
_LOOKS = frozenset(("locals", "eval", "exec"))  # would see the new variable


class Place(NamedTuple):
    """A call of a child on a residual stream, which may be a norm."""

    name: str  # of the child
    adds: bool  # to a sum made right before it; else to a stream from elsewhere


class Writer:
    """Rewrites a function: `places` says what was found, `why` what stood in the way of one."""

    def __init__(self, function: ast.FunctionDef | None) -> None:
        self.places: list[Place] = []
        self.why: str | None = None
        if function is None:
            return
        self._function = function
        arguments = [*function.args.posonlyargs, *function.args.args]
        self._self = arguments[0].arg if arguments else ""
        if self._self and self._plain():
            self._sums(function.body)
            self._streams(function.body)

    def _plain(self) -> bool:
        """Whether the function's variables are its own, and `self` stays what it is."""
        for node in ast.walk(self._function):
            if isinstance(node, ast.Global | ast.Nonlocal):
                return False
            if isinstance(node, ast.Name):
                if node.id in _LOOKS or node.id == _Y:
                    return False
                if node.id == self._self and not isinstance(node.ctx, ast.Load):
                    return False
        return True

    def _sums(self, block: list[ast.stmt]) -> None:
        """Sums that are normed, in a block and those within."""
        for position, statement in enumerate(block):
            if isinstance(statement, _SCOPES):
                continue
            for inner in blocks(statement):
                self._sums(inner)
            self._sum(block, position)

    def _sum(self, block: list[ast.stmt], position: int) -> None:
        """Rewrites `S = A + B` at the position, if S is normed in the statements after it."""
        statement = block[position]
        if not isinstance(statement, ast.Assign) or (name := _target(statement)) is None:
            return
        total = statement.value
        if not isinstance(total, ast.BinOp) or not isinstance(total.op, ast.Add):
            return
        names = {name}
        for place, following in enumerate(block[position + 1 :], position + 1):
            if (copied := _copied(following)) is None:
                call = self._first_call(following)
                if call is None or _given(call) not in names:
                    return
                if self._in_place(names, block, place):
                    return
                statement.targets = [_both(name)]
                statement.value = self._helper(ADD, call, [total.left, total.right], total)
                _choose(following, call)
                self.places.append(Place(_name(call), True))
                return
            target, source = copied
            names = names | {target} if source in names else names - {target}

    def _streams(self, block: list[ast.stmt]) -> None:
        """Streams from elsewhere, in the function's own block, where all that reads them later can
        be seen."""
        same: dict[str, set[str]] = {}  # by variable, those that stand for the same
        before: list[tuple[int, ast.stmt]] = []
        for position, statement in enumerate(block):
            copied = _copied(statement)
            stored = written(statement)
            if copied is None and (call := self._first_call(statement)) is not None:
                names = same.get(_given(call), {_given(call)})
                made = self._stream(block, position, call, names)
                if made is not None:
                    before.append((position, made))
            for name in stored:
                same.pop(name, {name}).discard(name)
            if copied is not None and copied[0] != copied[1]:
                same.setdefault(copied[1], {copied[1]}).add(copied[0])
                same[copied[0]] = same[copied[1]]
        for position, made in reversed(before):
            block.insert(position, made)

    def _stream(
        self, block: list[ast.stmt], position: int, call: ast.Call, names: set[str]
    ) -> ast.stmt | None:
        """Rewrites the call in the statement there, if one of the names for what it is given is
        read from there on, and in sums alone; returns what has to stand before it."""
        uses = {name: _uses(block[position:], name, call.args[0]) for name in sorted(names)}
        read = [name for name, sums in uses.items() if sums]
        if len(read) != 1 or not all(uses[read[0]]):
            return None
        if self._in_place(names, block, position):
            return None
        given = ast.copy_location(ast.Name(_given(call), ast.Load()), call)
        made = ast.Assign([_both(read[0])], self._helper(PASS, call, [given], call))
        _choose(block[position], call)
        self.places.append(Place(_name(call), False))
        return ast.copy_location(made, made.value)

    def _first_call(self, statement: ast.stmt) -> ast.Call | None:
        """A call self.child(variable) that is the first thing done in the statement."""
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr):
            return None
        call = None if statement.value is None else _first_done(statement.value)
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            return None
        alone = len(call.args) == 1 and isinstance(call.args[0], ast.Name) and not call.keywords
        own = isinstance(call.func.value, ast.Name) and call.func.value.id == self._self
        return call if own and alone else None

    def _in_place(self, names: set[str], block: list[ast.stmt], first: int) -> bool:
        """Whether what the variables stand for may be changed after the first statement: while they
        stand for it, in the function's own block; by any statement, in one within."""
        names = {*names}
        own = block is self._function.body
        for statement in block[first:] if own else self._function.body:
            for node in ast.walk(statement):
                for changed in _changed(node):
                    if isinstance(changed, ast.Name) and changed.id in names:
                        self.why = f"{changed.id} is changed in place"
                        return True
            if own and (copied := _copied(statement)) is not None and copied[1] in names:
                names |= {copied[0]}
            elif own and not blocks(statement):
                names -= written(statement)
        return False

    def _helper(
        self, method: str, call: ast.Call, values: list[ast.expr], where: ast.expr
    ) -> ast.Call:
        made = ast.Call(
            ast.Attribute(ast.Name(self._self, ast.Load()), method, ast.Load()),
            [ast.Constant(_name(call)), *values],
            [],
        )
        return ast.copy_location(made, where)


def _name(call: ast.Call) -> str:
    attribute = call.func
    assert isinstance(attribute, ast.Attribute)
    return attribute.attr


def _given(call: ast.Call) -> str:
    argument = call.args[0]
    assert isinstance(argument, ast.Name)
    return argument.id


def _target(statement: ast.Assign) -> str | None:
    """The variable that it assigns to, if it is one."""
    target = statement.targets[0]
    return target.id if len(statement.targets) == 1 and isinstance(target, ast.Name) else None


def _copied(statement: ast.stmt) -> tuple[str, str] | None:
    """The two variables of `a = b`."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
        return None
    target = _target(statement)
    return None if target is None else (target, statement.value.id)


def _first_done(node: ast.expr) -> ast.expr | None:
    """The first in an expression that does more than read variables and their attributes."""
    if isinstance(node, ast.Constant) or _is_path(node):
        return None
    parts: list[ast.expr] = []
    if isinstance(node, ast.Call) and _is_path(node.func):
        parts = [*node.args, *(keyword.value for keyword in node.keywords)]
    elif isinstance(node, ast.BinOp):
        parts = [node.left, node.right]
    elif isinstance(node, ast.Tuple | ast.List):
        parts = node.elts
    for part in parts:
        if (found := _first_done(part)) is not None:
            return found
    return None if isinstance(node, ast.Tuple | ast.List) else node


def _is_path(node: ast.expr) -> bool:
    """Whether it is a variable, or attributes of one."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _changed(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement or an expression changes in place."""
    if isinstance(node, ast.AugAssign):
        yield node.target
    elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        yield node.value
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
            yield node.func.value
        if any(keyword.arg == "inplace" for keyword in node.keywords):
            yield from node.args
        yield from (keyword.value for keyword in node.keywords if keyword.arg == "out")


def _uses(statements: list[ast.stmt], name: str, normed: ast.expr) -> list[bool]:
    """Of each place where a variable is read, but for the one that is normed, until it is assigned
    to: whether it is a term of a sum that is computed once at most."""
    found: list[bool] = []
    for statement in statements:
        found += _reads(statement, name, normed, True, False)
        if not blocks(statement) and name in written(statement):
            break
    return found


def _reads(
    node: ast.AST, name: str, normed: ast.expr, once: bool, summed: bool
) -> Iterator[bool]:
    if node is normed:
        return
    if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
        yield once and summed
    once = once and not isinstance(node, _AGAIN)
    adds = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        adds = node.func.attr == ADD
    for child in ast.iter_child_nodes(node):
        yield from _reads(child, name, normed, once, adds)


def _both(name: str) -> ast.Tuple:
    """The target `_fp8_y, name`."""
    return ast.Tuple([ast.Name(n, ast.Store()) for n in (_Y, name)], ast.Store())


def _choose(statement: ast.stmt, call: ast.Call) -> None:
    """Puts y, where there is one, in place of the call in the statement."""

    class Chooser(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            if node is not call:
                return self.generic_visit(node)
            y = ast.Name(_Y, ast.Load())
            taken = ast.Call(ast.Attribute(y, "pop", ast.Load()), [], [])
            return ast.copy_location(ast.IfExp(y, taken, call), call)

    Chooser().visit(statement)
