"""The fusion `rope`: modules whose forward rotates q and k by a function of its file run
`fp8.ops.rope` in its place."""

from torch import nn

from .._native.progress import progress
from ..nn import _fused_rope
from ..nn._calls import has_own_forward
from ..nn._fused_classes import made_class
from ..nn._fused_rope import (
    fused_class,
    obstacle,
    original,
    rotations,
    with_stand_ins,
    without_stand_ins,
)
from ..nn._rope_spec import RopeSpec
from ..nn._rotations import Rotation
from ._classes import change, give_back, innermost, refused, replaced
from ._fusions import Fusable


def find(model: nn.Module) -> list[Fusable]:
    """Every module of the model whose forward rotates, or seems to, fused ones included."""
    known: dict[type[nn.Module], dict[str, Rotation]] = {}
    found = []
    for name, module in progress([*model.named_modules()], "fp8: rotations", "module"):
        kind = innermost(type(module), original)
        if kind not in known:
            known[kind] = rotations(kind)
        specs = {n: rotation.spec for n, rotation in known[kind].items()}
        computes = {n: spec for n, spec in specs.items() if spec is not None}
        if computes or is_fused(module):
            found.append(Fusable(module, name, computes, _refused(module, kind)))
        elif seeming := [n for n in specs if _seems_to(known[kind][n])]:
            why = f"not fused: {', '.join(seeming)} computes no rotation that is known"
            found.append(Fusable(module, name, computes, why))
    return found


def _seems_to(rotation: Rotation) -> bool:
    """For a reason in the summary: by its arguments' names, whatever it computes."""
    function = rotation.function()
    names = () if function is None else function.__code__.co_varnames
    return {"cos", "sin"} <= {*names} or any(n.startswith("freqs_ci") for n in names)


def _refused(module: nn.Module, kind: type[nn.Module]) -> str | None:
    if is_fused(module):
        return None
    if not has_own_forward(module) and (why := obstacle(kind)) is not None:
        return f"not fused: {why}"
    return refused(module, lambda: fused_class(kind))


def is_fused(module: nn.Module) -> bool:
    """Whether the module has a fused class, or one that something made of that."""
    return made_class(type(module), original) is not None


def stale(module: nn.Module) -> str | None:
    """Why a fused module runs its class's own forward, whatever its input; None if it does not."""
    return replaced(module) or _fused_rope.stale(made_class(type(module), original))


def apply(found: Fusable) -> None:
    """Changes the module's class; one that is fused takes that of its class's forward as it is."""
    module = found.module
    kind = type(module)
    if is_fused(module) and without_stand_ins(kind) is None:
        return  # something made of a fused one
    change(module, with_stand_ins(kind))


def undo(module: nn.Module) -> str | None:
    """Gives the module its class back; why not, if that cannot be."""
    return give_back(module, without_stand_ins(type(module)))


def describe(found: Fusable) -> tuple[str, str]:
    """What it computes, for the summary."""
    specs: dict[str, RopeSpec] = found.what
    layouts = dict.fromkeys(spec.layout for spec in specs.values())
    return "-", ", ".join(["rope", *layouts])
