"""Python's bytecode, as far as _reads.py looks at it: loads of names, attributes, what follows
them, and branches on attributes of `self`.

For Python 3.10 to 3.14, whose instructions differ in name and in what they put beside each other,
hence tokens. An unknown instruction is a token of its own and makes nothing of what is around it.
"""

import dis
import functools
import operator
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_NOISE = frozenset(
    (
        "CACHE",
        "COPY_FREE_VARS",
        "EXTENDED_ARG",
        "MAKE_CELL",
        "NOP",
        "NOT_TAKEN",
        "PRECALL",
        "PUSH_NULL",
        "RESUME",
    )
)
_ENDS = (  # what never goes on to the next instruction
    "JUMP_FORWARD",
    "JUMP_ABSOLUTE",
    "JUMP_BACKWARD",
    "JUMP_NO_INTERRUPT",
    "RETURN",
    "RAISE",
    "RERAISE",
)
_JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
_KINDS = (  # token kinds, by what an instruction's name begins with
    (("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF"), "load"),
    (("STORE_FAST", "STORE_DEREF"), "store"),
    (("LOAD_ATTR", "LOAD_METHOD"), "attribute"),
    (("LOAD_GLOBAL", "LOAD_NAME"), "global"),
    (("LOAD_CONST", "LOAD_SMALL_INT"), "constant"),
    (("BINARY_SUBSCR",), "item"),
    (("IS_OP",), "is"),
    (("FOR_ITER",), "each"),
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_PLAIN = (type(None), bool, int, float, str)
_UNKNOWN = object()


@dataclass(frozen=True)
class Token:
    """A step of the code. kind: load, store (of a local name), attribute, global, constant, item
    (a[b]), is, none (a jump on None), each (of a loop), other."""

    kind: str
    value: Any = None


@dataclass(frozen=True)
class Branch:
    """A jump on an attribute of `self`."""

    at: int  # index of the instruction
    path: tuple[str, ...]
    test: str  # of the value: "true", "none", or an operator that compares it with `constant`
    constant: Any
    jumps_if: bool

    def outcome(self, module: nn.Module) -> bool | None:
        """Whether it jumps in `module`; None where that is not known."""
        value = _lookup(module, self.path)
        if value is _UNKNOWN:
            return None
        if self.test == "none":
            return (value is None) is self.jumps_if
        if not isinstance(value, _PLAIN):
            return None
        if self.test == "true":
            return bool(value) is self.jumps_if
        try:
            return bool(_COMPARE[self.test](value, self.constant)) is self.jumps_if
        except TypeError:
            return None


def tokens_of(code: types.CodeType, outcomes: tuple[bool | None, ...] = ()) -> list[Token]:
    """The code in order, without what cannot be reached if its branches have these outcomes."""
    tokens: list[Token] = []
    instructions = _instructions(code)
    dead = _dead(code, outcomes)
    for index, instruction in enumerate(instructions):
        name, value = instruction.opname, instruction.argval
        if name == "GET_ITER":
            continue
        if index in dead:
            tokens.append(Token("other"))
        elif isinstance(value, tuple) and name.count("_FAST") == 2:  # two of these in one
            second = max(name.rfind("LOAD_FAST"), name.rfind("STORE_FAST"))
            for part, one in zip((name[:second], name[second:]), value, strict=True):
                tokens.append(Token("store" if part.startswith("STORE") else "load", one))
        elif name.endswith(("_IF_NONE", "_IF_NOT_NONE")):
            tokens.append(Token("none"))
        elif name == "BINARY_OP" and instruction.argrepr == "[]":
            tokens.append(Token("item"))
        else:
            kind = next((kind for starts, kind in _KINDS if name.startswith(starts)), "other")
            tokens.append(Token(kind, value))
    return tokens


@functools.lru_cache(4096)
def branches(code: types.CodeType) -> tuple[Branch, ...]:
    """The jumps of a method whose condition is an attribute that it does not set itself, and that
    is not `training`: what a module's settings decide once and for all."""
    if not code.co_argcount:
        return ()
    instructions = _instructions(code)
    stored = {i.argval for i in instructions if i.opname == "STORE_ATTR"} | {"training"}
    found = (_branch(instructions, at, code.co_varnames[0]) for at in range(len(instructions)))
    return tuple(one for one in found if one is not None and not stored & {*one.path})


def _branch(instructions: list[dis.Instruction], at: int, self_name: str) -> Branch | None:
    name = instructions[at].opname
    if "JUMP" not in name or "_IF_" not in name:
        return None
    constant, test = None, "true"
    jumps_if = "IF_TRUE" in name
    before = at - 1
    if before >= 0 and instructions[before].opname == "TO_BOOL":
        before -= 1
    if name.endswith(("_IF_NONE", "_IF_NOT_NONE")):
        test, jumps_if = "none", name.endswith("_IF_NONE")
    elif before > 0 and instructions[before].opname in ("COMPARE_OP", "IS_OP"):
        operand = instructions[before - 1]
        if not operand.opname.startswith(("LOAD_CONST", "LOAD_SMALL_INT")):
            return None
        constant = operand.argval
        if instructions[before].opname == "COMPARE_OP":
            test = str(instructions[before].argval)
        elif constant is None:
            test, jumps_if = "none", jumps_if is not bool(instructions[before].arg)  # is not
        else:
            return None
        before -= 2
    path: list[str] = []
    while before >= 0 and instructions[before].opname == "LOAD_ATTR":
        path.insert(0, instructions[before].argval)
        before -= 1
    if not path or before < 0 or instructions[before].argval != self_name:
        return None
    if test not in ("true", "none", *_COMPARE):
        return None
    return Branch(at, tuple(path), test, constant, jumps_if)


def _dead(code: types.CodeType, outcomes: tuple[bool | None, ...]) -> set[int]:
    """Indices of instructions that only these outcomes make unreachable."""
    if all(outcome is None for outcome in outcomes):
        return set()
    known = {
        branch.at: outcome
        for branch, outcome in zip(branches(code), outcomes, strict=True)
        if outcome is not None
    }
    instructions = _instructions(code)
    return _reached(instructions, {}) - _reached(instructions, known)


def _reached(instructions: list[dis.Instruction], known: dict[int, bool]) -> set[int]:
    index_of = {instruction.offset: i for i, instruction in enumerate(instructions)}
    offsets = sorted(index_of)
    reached: set[int] = set()
    waiting = [0]
    while waiting:
        at = waiting.pop()
        if at in reached or at >= len(instructions):
            continue
        reached.add(at)
        instruction = instructions[at]
        jumps = known.get(at)
        if jumps is not True and not instruction.opname.startswith(_ENDS):
            waiting.append(at + 1)
        if jumps is not False and instruction.opcode in _JUMPS:
            # A target may be an instruction that was left out: the next one then.
            waiting += [index_of[o] for o in _first(offsets, instruction.argval)]
    return reached


def _first(offsets: list[int], least: int) -> Iterable[int]:
    return [o for o in offsets if o >= least][:1]


@functools.lru_cache(4096)
def _instructions(code: types.CodeType) -> list[dis.Instruction]:
    return [i for i in dis.get_instructions(code) if i.opname not in _NOISE]


def _lookup(module: nn.Module, path: tuple[str, ...]) -> Any:
    """The value at an attribute path, without running any code of the objects."""
    value: Any = module
    for name in path:
        have = getattr(value, "__dict__", {})
        places = [have]
        if isinstance(value, nn.Module):
            places += [have["_parameters"], have["_buffers"], have["_modules"]]
        found = next((place[name] for place in places if name in place), _UNKNOWN)
        if found is _UNKNOWN and not isinstance(value, Tensor | type):
            found = next((vars(k)[name] for k in type(value).__mro__ if name in vars(k)), _UNKNOWN)
            if hasattr(found, "__get__"):  # a property or a method
                return _UNKNOWN
        if found is _UNKNOWN:
            return _UNKNOWN
        value = found
    return value
