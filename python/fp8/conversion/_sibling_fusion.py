"""The fusion `siblings`: linear layers of one module that read one tensor are computed as one,
`fp8.ops.merged_linear`."""

from torch import nn

from ..nn._fused_mlps import own_class as own_class_of_mlp
from ..nn._fused_siblings import (
    NOTES,
    Notes,
    fused_class,
    groups_of,
    obstacle,
    original,
    own_class,
)
from ..nn._linear import Linear
from ..nn._merged import MergedLinear
from ._classes import change, give_back, refused, replaced
from ._fusions import Fusable

_LINEARS = (Linear, nn.Linear)


def find(model: nn.Module) -> list[Fusable]:
    """Every module of the model with linear layers that read one tensor, fused ones included."""
    found = []
    for name, module in model.named_modules():
        base = own_class(type(module)) or type(module)
        if len(module._modules) < 2 or isinstance(module, MergedLinear):
            continue
        what = [tuple(group) for group in groups_of(module, base, _LINEARS)]
        if what or is_fused(module):
            one_node = own_class_of_mlp(type(module)) is not None  # unless that is undone
            found.append(Fusable(module, name, what, _refused(module), listed=not one_node))
    return found


def _refused(module: nn.Module) -> str | None:
    return None if is_fused(module) else refused(module, lambda: fused_class(type(module)))


def is_fused(module: nn.Module) -> bool:
    """Whether the module has a fused class, or one that something made of that."""
    return own_class(type(module)) is not None


def apply(found: Fusable) -> None:
    """Changes the module's class, if two such layers run in FP8; one that is fused, or an MLP that
    is one node, stays as it is."""
    module = found.module
    kind = type(module)
    if is_fused(module) or own_class_of_mlp(kind) is not None or not groups_of(module, kind):
        return
    vars(module)[NOTES] = Notes()
    change(module, fused_class(kind))


def undo(module: nn.Module) -> str | None:
    """Gives the module its class back; why not, if that cannot be."""
    return give_back(module, original(type(module)), NOTES)


def stale(module: nn.Module) -> str | None:
    """Why a fused module's layers run one by one, whatever it is called with; None if some are
    computed together."""
    if own_class_of_mlp(type(module)) is not None:
        return "it is one node as an mlp"
    if (why := replaced(module)) is not None:
        return why
    base = own_class(type(module)) or type(module)
    groups = groups_of(module, base)
    obstacles = [obstacle(tuple(group), [*group.values()], _notes(module)) for group in groups]
    if not groups:
        return "no two of its layers that read one tensor are in FP8"
    return None if None in obstacles else obstacles[0]


def unable(found: Fusable) -> str | None:
    """Why a module that is not fused cannot be, for now."""
    base = type(found.module)
    if groups_of(found.module, base):
        return None
    names = [name for group in found.what for name in group]
    return f"not fused: no two of {', '.join(names)} are in FP8"


def describe(found: Fusable) -> tuple[str, str]:
    """Sizes of the layers that are computed together, and their names, for the summary."""
    module = found.module
    groups = groups_of(module, own_class(type(module)) or type(module), _LINEARS)
    notes = _notes(module)
    sizes, texts = [], []
    for group in groups:
        fp8 = {name: layer for name, layer in group.items() if isinstance(layer, Linear)}
        shown = fp8 if len(fp8) > 1 else group
        why = obstacle(tuple(fp8), [*fp8.values()], notes) if len(fp8) > 1 else "not in FP8"
        widths = " + ".join(str(layer.out_features) for layer in shown.values())
        sizes.append(f"{next(iter(shown.values())).in_features} -> {widths}")
        texts.append(f"{', '.join(shown)} as one" + ("" if why is None else f" (not: {why})"))
    return "; ".join(sizes) or "-", "siblings, " + "; ".join(texts)


def _notes(module: nn.Module) -> Notes | None:
    notes: Notes | None = vars(module).get(NOTES)
    return notes
