"""Weights that a module's code takes from a child instead of calling it: self.qkv.weight for
F.linear, say. The class of such a child means nothing to the product.

Found in the bytecode of forward and of the methods that it reaches through `self`, in which
attribute chains are plain to see: no source is needed, nothing is run. What goes through getattr,
`parameters()` or a function that is given the module is not seen.
"""

import functools
import types
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn._class_code import method_codes
from ._bytecode import Token, branches, tokens_of

Path = tuple[str, ...]
"""Of a module below `self`: names of children, EACH for any of them."""

EACH = "*"

_TENSORS = ("weight", "bias")

_METADATA = frozenset(
    (
        *("dtype", "device", "layout", "shape", "size", "dim", "ndim", "numel", "nelement"),
        *("stride", "storage_offset", "is_contiguous", "itemsize", "nbytes", "element_size"),
        *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "get_device", "names", "is_sparse"),
        *("is_quantized", "is_nested", "is_complex", "is_floating_point", "is_inference"),
        *("requires_grad", "requires_grad_", "is_leaf", "grad", "grad_fn", "__class__"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
    )
)
"""Attributes of a tensor that say nothing of its values."""

_ASKING = frozenset(
    ("isinstance", "hasattr", "getattr", "type", "id", "len", "is_tensor", "is_floating_point")
)
_LIKE = frozenset(
    ("to", "type_as", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like")
)
"""Functions whose first argument's values do not matter."""


@dataclass
class Reads:
    """What code does with the modules below `self`."""

    weights: set[Path] = field(default_factory=set)
    """Whose weight it uses as a tensor."""
    biases: set[Path] = field(default_factory=set)
    dtypes: set[Path] = field(default_factory=set)
    """The dtype of whose weight it reads, to cast something to it."""
    used: set[Path] = field(default_factory=set)
    """Which it calls or hands on: who gets a module may call it."""
    methods: set[str] = field(default_factory=set)
    """Names right behind `self`."""


def reads_of(module: nn.Module) -> dict[str, Reads]:
    """By the name of the method, what forward and the methods that it reaches do.

    A branch that the module's settings rule out does not count: under `if self.q_bias is None:`,
    say, where there is a q_bias.
    """
    found: dict[str, Reads] = {}
    waiting = ["forward", "__call__"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = total = Reads()
        for code in method_codes(type(module), name, _code):
            outcomes = tuple(branch.outcome(module) for branch in branches(code))
            reads = _reads_of_code(code, outcomes)
            total.weights |= reads.weights
            total.biases |= reads.biases
            total.dtypes |= reads.dtypes
            total.used |= reads.used
            waiting += sorted(reads.methods)
    return found


def _code(attribute: Any) -> types.CodeType | None:
    """Of a function, method or property, below its decorators."""
    for _ in range(20):
        if isinstance(attribute, property):
            attribute = attribute.fget
        elif isinstance(attribute, functools.cached_property):
            attribute = attribute.func
        elif hasattr(attribute, "__wrapped__"):
            attribute = attribute.__wrapped__
        elif isinstance(attribute, types.MethodType):
            attribute = attribute.__func__
    return attribute.__code__ if isinstance(attribute, types.FunctionType) else None


@functools.lru_cache(4096)
def _reads_of_code(code: types.CodeType, outcomes: tuple[bool | None, ...]) -> Reads:
    reads = Reads()
    if code.co_argcount:
        _scan(code, outcomes, {code.co_varnames[0]: {()}}, {}, reads)
    return reads


def _scan(
    code: types.CodeType,
    outcomes: tuple[bool | None, ...],
    modules: dict[str, set[Path]],
    tensors: dict[str, set[tuple[Path, str]]],
    reads: Reads,
) -> None:
    """Adds to `reads`. modules, tensors: what local names stand for, whatever the order of the
    code; those of functions within see them too."""
    modules, tensors = defaultdict(set, modules), defaultdict(set, tensors)
    tokens = tokens_of(code, outcomes)
    for final in (False, True):  # names are gathered first: a loop's end comes before its beginning
        index = 0
        while index < len(tokens):
            token = tokens[index]
            before = tokens[index - 1] if index else Token("other")
            index += 1
            if token.kind != "load":
                continue
            attributes, index = _chain(tokens, index)
            after = tokens[index : index + 2]
            for path in sorted(modules[token.value]):
                _module(path + attributes, path, before, after, modules, tensors, reads, final)
            for path, name in sorted(tensors[token.value]):
                _tensor(path, name, attributes, before, after, tensors, reads, final)
    for token in tokens:  # functions within, where they are made
        inner = token.value
        if isinstance(inner, types.CodeType):
            own = inner.co_varnames
            _scan(
                inner,
                (),
                {name: paths for name, paths in modules.items() if name not in own},
                {name: paths for name, paths in tensors.items() if name not in own},
                reads,
            )


def _chain(tokens: list[Token], index: int) -> tuple[Path, int]:
    """The attributes and items from `index` on, and where they end."""
    path: list[str] = []
    while index < len(tokens):
        if tokens[index].kind == "attribute":
            path.append(tokens[index].value)
            index += 1
        elif (
            path
            and tokens[index].kind in ("load", "constant")
            and [token.kind for token in tokens[index + 1 : index + 2]] == ["item"]
        ):
            value = tokens[index].value
            path.append(str(value) if type(value) is int and value >= 0 else EACH)
            index += 2
        else:
            break
    return tuple(path), index


def _module(
    path: Path,
    start: Path,
    before: Token,
    after: list[Token],
    modules: dict[str, set[Path]],
    tensors: dict[str, set[tuple[Path, str]]],
    reads: Reads,
    final: bool,
) -> None:
    """A chain that begins at a module."""
    if start == () and path and final:
        reads.methods.add(path[0])
    for at in range(max(len(start), 1), len(path)):
        if path[at] in _TENSORS:
            rest = path[at + 1 :]
            _tensor(path[:at], path[at], rest, before, after, tensors, reads, final)
            return
    kinds = [token.kind for token in after]
    if kinds[:1] == ["store"]:
        modules[after[0].value].add(path)
    elif kinds == ["each", "store"]:
        modules[after[1].value].add((*path, EACH))
    elif final and path and not _asks(before, after):
        reads.used.add(path)


def _tensor(
    path: Path,
    name: str,
    rest: Path,
    before: Token,
    after: list[Token],
    tensors: dict[str, set[tuple[Path, str]]],
    reads: Reads,
    final: bool,
) -> None:
    """A chain that has come to a weight or bias; `rest`: the attributes behind it."""
    while rest[:1] == ("data",):
        rest = rest[1:]
    if rest:
        if rest[0] == "dtype" and name == "weight" and final:
            reads.dtypes.add(path)
        if rest[0] in _METADATA or (rest[0] != EACH and not hasattr(torch.Tensor, rest[0])):
            return  # dtype and the like, or a mark of a quantization library
    elif after and after[0].kind == "store":
        tensors[after[0].value].add((path, name))
        return
    elif _asks(before, after) or before.value in _LIKE:
        return
    if final:
        (reads.weights if name == "weight" else reads.biases).add(path)


def _asks(before: Token, after: list[Token]) -> bool:
    """Whether a value is only asked whether it is None, an instance of a class, and so on."""
    if before.kind in ("global", "attribute") and before.value in _ASKING:
        return True
    if after[:1] == [Token("none")]:
        return True
    return after[:1] == [Token("constant", None)] and [t.kind for t in after[1:]] == ["is"]
