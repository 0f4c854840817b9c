"""The fusion `residual`: layers that norm a residual stream add to it in the same pass,
`fp8.ops.add_rms_norm`, and join its gradient in the norm's backward."""

from torch import nn

from ..nn import _fused_residuals
from ..nn._fused_classes import made_class
from ..nn._fused_residuals import (
    fused_class,
    norm_obstacle,
    obstacle,
    original,
    places,
    with_residuals,
    without_residuals,
)
from ..nn._fused_rope import without_stand_ins
from ..nn._residual_places import Place
from ._classes import change, give_back, innermost, refused, replaced
from ._fusions import Fusable
from ._norm_fusion import find as find_norms


def find(model: nn.Module) -> list[Fusable]:
    """Every module of the model whose forward norms a residual stream, fused ones included; and
    those with norms whose forward cannot be read, each with the reason."""
    norms = {norm.module for norm in find_norms(model)}
    found = []
    for name, module in model.named_modules():
        if not is_fused(module) and norms.isdisjoint(module._modules.values()):
            continue
        kind = innermost(type(module), original)
        what = tuple(p for p in places(kind) if module._modules.get(p.name) in norms)
        if what or is_fused(module):
            found.append(Fusable(module, name, what, _refused(module, kind)))
        elif (why := obstacle(kind)) is not None:
            found.append(Fusable(module, name, what, f"not fused: {why}"))
    return found


def _refused(module: nn.Module, kind: type[nn.Module]) -> str | None:
    if is_fused(module):
        return None
    why = refused(module, lambda: fused_class(kind))
    if why is None and _rotates(type(module)):
        return "not fused: its own forward calls a rotation that is"
    return why


def _rotates(kind: type[nn.Module]) -> bool:
    """Whether the forward is changed already, for the fusion `rope`."""
    return without_stand_ins(kind) is not None


def is_fused(module: nn.Module) -> bool:
    """Whether the module has a fused class, or one that something made of that."""
    return made_class(type(module), original) is not None


def stale(module: nn.Module) -> str | None:
    """Why a fused module runs its class's own forward, whatever its input; None if it does not."""
    kind = made_class(type(module), original)
    return replaced(module) or _fused_residuals.stale(module, kind)


def unable(found: Fusable) -> str | None:
    """Why a module that is not fused cannot be, for now."""
    why = [norm_obstacle(found.module, place) for place in found.what]
    return None if None in why else f"not fused: {why[0]}"


def apply(found: Fusable) -> None:
    """Changes the module's class, if one of its norms is fused; one that is fused takes that of its
    class's forward as it is."""
    module = found.module
    kind = type(module)
    if is_fused(module):
        if without_residuals(kind) is None:
            return  # something made of a fused one
    elif _rotates(kind) or unable(found) is not None:
        return
    change(module, with_residuals(kind))


def undo(module: nn.Module) -> str | None:
    """Gives the module its class back; why not, if that cannot be."""
    return give_back(module, without_residuals(type(module)))


def describe(found: Fusable) -> tuple[str, str]:
    """The norms that read a residual stream, for the summary."""
    places_of_norms: tuple[Place, ...] = found.what
    texts = []
    for place in places_of_norms:
        why = norm_obstacle(found.module, place)
        texts.append(place.name + ("" if why is None else f" (not: {why})"))
    return "-", ", ".join(["residual", *texts])
