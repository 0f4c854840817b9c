"""Which modules the probe of MLPs would find alike: a model's layers, mostly."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from ..nn._mlp_probe import linears_of

_SIMPLE = (bool, int, float, str, torch.dtype, type(None))


def key_of(module: nn.Module) -> Hashable:
    """What decides what the probe sees of a module whose linears are its own: its class and their
    sizes; of all else values that are plain, what plain containers and children hold, and of
    anything else which object it is. Keys compare while their modules live."""
    linears = linears_of(module) or {}
    sizes = tuple(
        (name, layer.in_features, layer.out_features, layer.bias is None)
        for name, layer in linears.items()
    )
    return sizes, _key(module, {id(layer) for layer in linears.values()})


def _key(value: Any, apart: set[int]) -> Hashable:
    if id(value) in apart:
        return None
    if isinstance(value, _SIMPLE):
        return type(value), repr(value)  # 0.0 is not -0.0
    if isinstance(value, nn.Module):
        return type(value), _key(vars(value), apart)
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return type(value), tuple((name, _key(item, apart)) for name, item in value.items())
    if isinstance(value, list | tuple | set) and not value:
        return type(value)
    return id(value)
