"""Fusions: what `fp8.convert` does beside linears and experts, one module of this folder each.

A fusion finds modules by what they compute, changes their class to a subclass whose forward runs a
fused operator where nothing is in the way, and changes it back. To add one: a module with the
functions of `Fusion`, and a line in `fusions`.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn


class Fusable(NamedTuple):
    """A module that a fusion knows how to fuse."""

    module: nn.Module
    name: str  # as model.named_modules() has it
    what: Any  # the fusion's own: what was found
    refused: str | None = None  # why it must be left alone
    listed: bool = True  # whether the summary has a line for it


class Fusion(NamedTuple):
    """One kind of fusion."""

    name: str  # as `fuse` of fp8.convert takes it
    find: Callable[[nn.Module], list[Fusable]]  # in a model; changes nothing
    is_fused: Callable[[nn.Module], bool]
    apply: Callable[[Fusable], None]  # after the linears; it may leave the module as it is
    stale: Callable[[nn.Module], str | None]  # why a fused one runs its class's own forward
    undo: Callable[[nn.Module], str | None]  # why it could not be undone
    describe: Callable[[Fusable], tuple[str, str]]  # size, and what it computes
    unable: Callable[[Fusable], str | None] = lambda _: None  # why one found is not fused


def fusions() -> tuple[Fusion, ...]:
    """All of them, in the order in which they are applied."""
    from . import _mlp_fusion as mlp
    from . import _norm_fusion as norms
    from . import _residual_fusion as residual
    from . import _rope_fusion as rope
    from . import _sibling_fusion as siblings

    return (
        Fusion(
            name="norms",
            find=norms.find,
            is_fused=norms.is_fused,
            stale=norms.stale,
            apply=norms.apply,
            undo=norms.undo,
            describe=norms.describe,
        ),
        Fusion(
            name="mlp",
            find=mlp.find,
            is_fused=mlp.is_fused,
            stale=mlp.stale,
            apply=mlp.apply,
            undo=mlp.undo,
            describe=mlp.describe,
            unable=mlp.unable,
        ),
        Fusion(
            name="rope",
            find=rope.find,
            is_fused=rope.is_fused,
            stale=rope.stale,
            apply=rope.apply,
            undo=rope.undo,
            describe=rope.describe,
        ),
        Fusion(
            name="residual",
            find=residual.find,
            is_fused=residual.is_fused,
            stale=residual.stale,
            apply=residual.apply,
            undo=residual.undo,
            describe=residual.describe,
            unable=residual.unable,
        ),
        Fusion(
            name="siblings",
            find=siblings.find,
            is_fused=siblings.is_fused,
            stale=siblings.stale,
            apply=siblings.apply,
            undo=siblings.undo,
            describe=siblings.describe,
            unable=siblings.unable,
        ),
    )


def chosen(fuse: bool | Iterable[str]) -> tuple[Fusion, ...]:
    """The fusions that `fuse` of fp8.convert names. Raises TypeError or ValueError."""
    if isinstance(fuse, bool):
        return tuple(fusion for fusion in fusions() if fuse)
    names = [fusion.name for fusion in fusions()]
    if isinstance(fuse, str) or not isinstance(fuse, Iterable):
        raise TypeError(
            f"fp8.convert: expected fuse as a bool or a set of names out of {names}, got {fuse!r}"
        )
    wanted = set(fuse)
    if unknown := sorted(map(repr, wanted - set(names))):
        raise ValueError(f"fp8.convert: expected fuse out of {names}, got {', '.join(unknown)}")
    return tuple(fusion for fusion in fusions() if fusion.name in wanted)


def plan(model: nn.Module, wanted: Sequence[Fusion]) -> list[tuple[Fusion, Fusable]]:
    """What is to be fused: found before anything is changed."""
    return [
        (fusion, found)
        for fusion in wanted
        for found in fusion.find(model)
        if found.refused is None
    ]


def fused(model: nn.Module) -> list[tuple[Fusion, nn.Module]]:
    """The modules of the model that are fused."""
    kinds = fusions()
    return [(f, module) for module in model.modules() for f in kinds if f.is_fused(module)]


def undo(function: str, fusion: Fusion, module: nn.Module) -> None:
    """Warns, in the name of fp8.`function`, about a module that stays fused."""
    if (why := fusion.undo(module)) is not None:
        kind = type(module).__name__
        warnings.warn(f"fp8.{function}: a {kind} stays fused: {why}; undo that first", stacklevel=3)


Row = tuple[nn.Module, tuple[str, str, str, str]]


def rows(model: nn.Module) -> list[Row]:
    """For the summary: a line for each module that a fusion knows, where the model has one that is
    fused by it. Where several do, one line says so of each."""
    lines: dict[nn.Module, tuple[str, str, str, str]] = {}
    applied = {fusion.name for fusion, _ in fused(model)}
    for fusion in fusions():
        for found in fusion.find(model) if fusion.name in applied else ():
            if not found.listed:
                continue
            size, what = fusion.describe(found)
            state = f"fused: {what}"
            if not fusion.is_fused(found.module):
                why = found.refused or fusion.unable(found)
                state = f"- ({why or f'not fused: {what}'})"
            elif (why := fusion.stale(found.module)) is not None:
                state = f"- (not fused: {why})"
            dtype = next(
                (str(p.dtype).removeprefix("torch.") for p in found.module.parameters()), "-"
            )
            if found.module in lines:
                _, known_size, _, known = lines[found.module]
                size = size if known_size == "-" else known_size
                state = f"{known}; {state}"
            lines[found.module] = (found.name or "(model)", size, dtype, state)
    return list(lines.items())


def totals(model: nn.Module) -> list[str]:
    """A line for each fusion that was applied."""
    lines = []
    modules = fused(model)
    for fusion in fusions():
        count = sum(1 for f, m in modules if f.name == fusion.name and f.stale(m) is None)
        if count:
            lines.append(f"{count} {fusion.name} fused")
    return lines
