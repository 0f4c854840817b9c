"""The fusion `mlp`: feed-forward modules whose linears run in FP8 are one node, `fp8.ops.mlp`."""

from collections.abc import Hashable

from torch import nn

from .._native.progress import progress
from ..nn._calls import has_own_forward
from ..nn._fused_mlps import NOTES, Notes, fused_class, obstacle, original, own_class
from ..nn._linear import Linear
from ..nn._mlp import MLP, GatedMLP
from ..nn._mlp_probe import MLPSpec, linears_of, probe
from ._fusions import Fusable
from ._mlp_key import key_of


def find(model: nn.Module) -> list[Fusable]:
    """Every module of the model that is an MLP of linears, fused ones included."""
    known: dict[Hashable, MLPSpec | None] = {}
    found = []
    for name, module in progress([*model.named_modules()], "fp8: MLPs", "module"):
        if is_fused(module):
            notes: Notes | None = vars(module).get(NOTES)
            found.append(Fusable(module, name, notes and notes.spec))
            continue
        if isinstance(module, GatedMLP | MLP) or linears_of(module) is None:
            continue
        key = key_of(module)
        if key not in known:
            known[key] = probe(module, type(module))
        spec = known[key]
        if spec is None:
            continue
        refused = None
        if has_own_forward(module):
            refused = "its forward was replaced on the instance; convert before that"
        found.append(Fusable(module, name, spec, refused))
    return found


def is_fused(module: nn.Module) -> bool:
    """Whether the module has a fused class, or one that something made of that."""
    return own_class(type(module)) is not None


def apply(found: Fusable) -> None:
    """Changes the module's class, if its linears run in FP8; one that is fused stays as it is."""
    module = found.module
    linears = linears_of(module) or {}
    if is_fused(module) or not all(isinstance(linear, Linear) for linear in linears.values()):
        return
    base = type(module)
    notes = vars(module)[NOTES] = Notes()
    vars(module).pop("forward", None)  # that of the class it was: see has_own_forward
    module.__class__ = fused_class(base)
    notes.know(module, base, found.what)


def undo(module: nn.Module) -> str | None:
    """Gives the module its class back; why not, if that cannot be."""
    base = original(type(module))
    if base is None:
        return f"its class is {type(module).__name__}, made of a fused one"
    vars(module).pop(NOTES, None)
    module.__class__ = base
    return None


def keep(model: nn.Module, save: str) -> None:
    """Fused MLPs of the model keep this of gate and up for the backward."""
    for module in model.modules():
        if is_fused(module) and (notes := vars(module).get(NOTES)) is not None:
            notes.save = save


def stale(module: nn.Module) -> str | None:
    """Why a fused module runs layer by layer, whatever it is called with; None if it does not."""
    return obstacle(module)


def unable(found: Fusable) -> str | None:
    """Why a module that is not fused cannot be, for now."""
    for name, linear in (linears_of(found.module) or {}).items():
        if not isinstance(linear, Linear):
            return f"not fused: {name} is not in FP8"
    return None


def describe(found: Fusable) -> tuple[str, str]:
    """Its sizes and what it computes, for the summary."""
    spec: MLPSpec | None = found.what
    layers = linears_of(found.module)
    if spec is None or layers is None or not {spec.form.gate, spec.form.down} <= layers.keys():
        return "-", "mlp"
    down = layers[spec.form.down]
    size = f"{layers[spec.form.gate].in_features} -> {down.in_features} -> {down.out_features}"
    gated = "merged, " if spec.form.merged else "gated, " if spec.form.up else ""
    notes: Notes | None = vars(found.module).get(NOTES)
    saved = "" if notes is None or notes.save == "bf16" else f", save={notes.save}"
    return size, f"mlp, {gated}{spec.form.activation}{saved}"
