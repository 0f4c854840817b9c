"""The fusion `norms`: RMSNorm and LayerNorm modules run `fp8.ops.rms_norm` and `layer_norm`."""

from typing import Any

from torch import nn

from .._native.progress import progress
from ..nn._fused_classes import made_class
from ..nn._fused_norms import LAYER, SPEC, NormSpec, fused_class, original
from ..nn._fused_norms import stale as _stale
from ._classes import change, give_back, refused, replaced
from ._fusions import Fusable
from ._norm_key import Key, key_of
from ._norm_probe import probe


def find(model: nn.Module) -> list[Fusable]:
    """Every module of the model that is a norm, fused ones included, as they are now."""
    known: dict[Key, NormSpec | None] = {}
    found = []
    for name, module in progress([*model.named_modules()], "fp8: norms", "module"):
        fused, kind = is_fused(module), type(module)
        spec = vars(module).get(SPEC) if fused else None
        if not fused or original(kind) is not None:
            key = key_of(module, original(kind) or kind)
            if key is not None:
                if key not in known:
                    known[key] = probe(module, key)
                spec = known[key] or spec
        if spec is not None:
            found.append(Fusable(module, name, spec, _refused(module)))
    return found


def _refused(module: nn.Module) -> str | None:
    return None if is_fused(module) else refused(module, lambda: fused_class(type(module)))


def is_fused(module: nn.Module) -> bool:
    """Whether the module has a fused class, or one that something made of that."""
    return made_class(type(module), original) is not None


def stale(module: nn.Module) -> str | None:
    """Why a fused module runs its class's own forward, whatever its input; None if it does not."""
    return replaced(module) or _stale(module)


def apply(found: Fusable) -> None:
    """Changes the module's class; one that is fused stays, and is known anew."""
    module = found.module
    vars(module)[SPEC] = found.what
    kind = type(module)
    if is_fused(module) and original(kind) is None:
        return  # something made of a fused one
    change(module, fused_class(original(kind) or kind))


def undo(module: nn.Module) -> str | None:
    """Gives the module its class back; why not, if that cannot be."""
    return give_back(module, original(type(module)), SPEC)


def describe(found: Fusable) -> tuple[str, str]:
    """Its size and what it computes, for the summary."""
    spec: NormSpec = found.what
    parameter: Any = None if spec.weight is None else getattr(found.module, spec.weight, None)
    size = "-" if parameter is None else str(parameter.shape[-1])
    return size, "layer_norm" if spec.form == LAYER else f"rms_norm, {spec.form}"
