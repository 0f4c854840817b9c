"""Which modules may be norms, by what they have: the cheap question before the probe's."""

import inspect
from typing import Any

import torch
from torch import nn

from ..nn._class_code import names_read

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SIMPLE = (bool, int, float, str, torch.dtype, type(None))
_TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm)
_INTERNAL = frozenset(vars(nn.Module()))
# What others leave on a module, and take away, which no forward reads.
_NOTES = frozenset(("fp8_norm", "forward", "_old_forward", "_hf_hook", "_is_hf_initialized"))
_LOOKS = frozenset(("getattr", "hasattr", "vars", "__dict__"))  # may see what comes later


class Key(tuple[Any, ...]):
    """What decides what a module computes: equal keys, equal norms."""

    __slots__ = ()


def key_of(module: nn.Module, kind: type[nn.Module]) -> Key | None:
    """None for a module that cannot be a norm, by what it has: at most two parameters, of one
    dimension and one size, no buffers or children, and attributes that are plain values.
    kind: its class, or that which it had before it was fused."""
    if kind.__module__.startswith("torch.nn.") and kind not in _TORCH_NORMS:
        return None
    if module._modules or any(b is not None for b in module._buffers.values()):
        return None
    parameters = [(name, p) for name, p in module._parameters.items() if p is not None]
    if len(parameters) > 2 or len({(p.shape, p.dtype) for _, p in parameters}) > 1:
        return None
    for _, parameter in parameters:
        if parameter.dim() != 1 or parameter.numel() < 1 or parameter.dtype not in DTYPES:
            return None
    attributes = attributes_of(module, kind)
    if attributes is None or not _takes_one_tensor(kind):
        return None
    if names_read(kind) & _LOOKS:
        return None
    shapes = tuple((name, p.shape[0], p.dtype) for name, p in parameters)
    return Key((kind, shapes, tuple(module._parameters), attributes))


def attributes_of(module: nn.Module, kind: type[nn.Module]) -> tuple[tuple[str, Any], ...] | None:
    """What the module holds beside parameters, buffers, children and what every module has; None
    if a value among them is not plain. Private ones that are not plain do not count where its
    forward does not name them."""
    found = []
    for name, value in vars(module).items():
        if name in _INTERNAL or name in _NOTES:
            continue
        if _is_simple(value):
            found.append((name, value))
        elif not name.startswith("_") or name in names_read(kind):
            return None
    return tuple(found)


def _is_simple(value: Any) -> bool:
    return all(map(_is_simple, value)) if isinstance(value, tuple) else isinstance(value, _SIMPLE)


def _takes_one_tensor(kind: type) -> bool:
    """Whether forward(self, x) is a call of a plain function."""
    forward = kind.forward  # type: ignore[attr-defined]
    if not inspect.isfunction(forward):
        return False
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return len(needed) == 1 and needed[0].kind is needed[0].POSITIONAL_OR_KEYWORD
