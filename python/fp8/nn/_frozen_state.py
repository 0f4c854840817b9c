"""How the parameters of an fp8.FrozenLinear move, and what may be loaded into them.

Codes are no numbers: a cast would keep the number and lose the code's meaning, in silence. So what
casts a model sees integers of the same bits here, and a state_dict that has anything but codes
under `weight`, or codes without their scale, is refused.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._scales import WEIGHT_SCALES, granularity_of, to_float32

if TYPE_CHECKING:
    from ._frozen import FrozenLinear
    from ._frozen_experts import FrozenExperts

_AS_INTEGERS = {1: torch.uint8, 4: torch.int32}


def moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn`, which may move a tensor or cast it, of a tensor whose bits are to stay."""
    bits = tensor.detach().view(_AS_INTEGERS[tensor.element_size()])
    result = fn(bits)
    if result.dtype is not bits.dtype:  # .type(dtype) casts integers too
        result = bits.to(result.device)
    return result.view(tensor.dtype)


def as_bytes(parameters: dict[str, Any], names: Collection[str] = ("weight",)) -> dict[str, Any]:
    """Parameters of a layer for a pickle: codes, under these names, as uint8."""
    return _seen_as(torch.uint8, torch.float8_e4m3fn, parameters, names)


def from_bytes(parameters: dict[str, Any], names: Collection[str] = ("weight",)) -> dict[str, Any]:
    """What `as_bytes` was given."""
    return _seen_as(torch.float8_e4m3fn, torch.uint8, parameters, names)


def _seen_as(
    dtype: torch.dtype, before: torch.dtype, parameters: dict[str, Any], names: Collection[str]
) -> dict[str, Any]:
    found = {name: p for name in names if (p := parameters.get(name)) is not None}
    return parameters | {
        name: nn.Parameter(p.detach().view(dtype), requires_grad=False)
        for name, p in found.items()
        if p.dtype is before
    }


def fit(layer: "FrozenLinear", state_dict: dict[str, Any], prefix: str) -> str | None:
    """Bring what `state_dict` has for a layer to the dtypes and shapes of its parameters, where
    that changes no value; or say why it cannot be loaded."""
    name, scale_name = f"{prefix}weight", f"{prefix}{layer.scale_name}"
    where = f"fp8.FrozenLinear: {name!r}"
    weight, scale = state_dict.get(name), state_dict.get(scale_name)
    if isinstance(weight, Tensor) and weight.dtype is not torch.float8_e4m3fn:
        got = str(weight.dtype).removeprefix("torch.")
        return (
            f"{where}: expected codes in float8_e4m3fn, got {got}. This layer holds a weight in "
            "FP8 and quantizes none: load weights in high precision into the nn.Linear model and "
            "call fp8.freeze(model) then"
        )
    if weight is not None and scale is None:
        others = [f"{prefix}{n}" for n in WEIGHT_SCALES if f"{prefix}{n}" in state_dict]
        found = f", found {', '.join(map(repr, others))}" if others else ""
        return f"{where}: codes without their scale, expected {scale_name!r}{found}"
    if scale is not None and weight is None:
        return f"{where}: missing, beside {scale_name!r}, which is the scale of other codes"
    static_name = f"{prefix}{layer.input_scale_name}"
    if weight is not None and layer.static_scale is not None and static_name not in state_dict:
        return f"{where}: expected {static_name!r} beside it, the static scale of the input"
    rows, cols = layer.weight.shape
    for key, granularity, own in (
        (scale_name, layer.granularity, layer.scales),
        (static_name, "tensorwise", layer.static_scale),
    ):
        value = state_dict.get(key)
        if not isinstance(value, Tensor) or own is None:
            continue
        try:
            value = to_float32(value, f"fp8.FrozenLinear: {key!r}")
        except TypeError as error:
            return str(error)
        meant = granularity_of(tuple(value.shape), rows, cols)
        other = value.numel() > 1 and meant is not None and meant != granularity
        if other or _extents(value) != _extents(own):
            return (
                f"fp8.FrozenLinear: {key!r}: expected {list(own.shape)}, of a weight scaled "
                f"{granularity}, got {list(value.shape)}"
            )
        state_dict[key] = value.reshape(own.shape)
    return None


def fit_experts(module: "FrozenExperts", state_dict: dict[str, Any], prefix: str) -> str | None:
    """The same for both weights of an fp8.FrozenExperts."""
    for name in ("gate_up_proj", "down_proj"):
        where, scale_name = f"fp8.FrozenExperts: '{prefix}{name}'", f"{prefix}{name}"
        scale_name += module.scale_suffix
        codes, scale = state_dict.get(f"{prefix}{name}"), state_dict.get(scale_name)
        if isinstance(codes, Tensor) and codes.dtype is not torch.float8_e4m3fn:
            got = str(codes.dtype).removeprefix("torch.")
            return (
                f"{where}: expected codes in float8_e4m3fn, got {got}. These experts hold weights "
                "in FP8 and quantize none: load weights in high precision into the model before, "
                "and call fp8.freeze(model) then"
            )
        if codes is not None and scale is None:
            return f"{where}: codes without their scale, expected {scale_name!r}"
        if scale is not None and codes is None:
            return f"{where}: missing, beside {scale_name!r}, which is the scale of other codes"
        if not isinstance(scale, Tensor):
            continue
        own = module.scales(name)
        try:
            scale = to_float32(scale, f"fp8.FrozenExperts: {scale_name!r}")
        except TypeError as error:
            return str(error)
        if _extents(scale) != _extents(own):
            return (
                f"fp8.FrozenExperts: {scale_name!r}: expected {list(own.shape)}, of weights scaled "
                f"{module.granularity}, got {list(scale.shape)}"
            )
        state_dict[scale_name] = scale.reshape(own.shape)
    return None


def _extents(scale: Tensor) -> tuple[int, ...]:
    """Of a shape, those that tell it from others: some tools drop the rest."""
    return tuple(extent for extent in scale.shape if extent != 1)
