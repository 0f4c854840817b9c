"""The fusion `norms`: RMSNorm and LayerNorm modules run `fp8.ops.rms_norm` and `layer_norm`."""

from typing import Any

from torch import nn

from ..nn._calls import has_own_forward
from ..nn._fused_norms import LAYER, SPEC, NormSpec, fused_class, original
from ._fusions import Fusable
from ._norm_probe import Key, key_of, probe


def find(model: nn.Module) -> list[Fusable]:
    """Every module of the model that is a norm, fused ones included."""
    known: dict[Key, NormSpec | None] = {}
    found = []
    for name, module in model.named_modules():
        if is_fused(module):
            found.append(Fusable(module, name, vars(module)[SPEC]))
            continue
        key = key_of(module)
        if key is None:
            continue
        if key not in known:
            known[key] = probe(module, key)
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
    return any(original(kind) is not None for kind in type(module).__mro__)


def apply(found: Fusable) -> None:
    """Changes the module's class; one that is fused stays as it is."""
    if is_fused(found.module):
        return
    vars(found.module)[SPEC] = found.what
    vars(found.module).pop("forward", None)  # that of the class it was: see has_own_forward
    found.module.__class__ = fused_class(type(found.module))


def undo(module: nn.Module) -> str | None:
    """Gives the module its class back; why not, if that cannot be."""
    base = original(type(module))
    if base is None:
        return f"its class is {type(module).__name__}, made of a fused one"
    vars(module).pop(SPEC, None)
    module.__class__ = base
    return None


def describe(found: Fusable) -> tuple[str, str]:
    """Its size and what it computes, for the summary."""
    spec: NormSpec = found.what
    parameter: Any = None if spec.weight is None else getattr(found.module, spec.weight, None)
    size = "-" if parameter is None else str(parameter.shape[-1])
    return size, "layer_norm" if spec.form == LAYER else f"rms_norm, {spec.form}"
