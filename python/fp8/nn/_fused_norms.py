"""The forward of a norm that `fp8.convert` recognized: one fused operator where nothing is in the
way, else that of the module's own class.

A fused module has a subclass of its class, made once for each class: see _fused_classes.py. Pickles
name the original class, and `fused_norm`, which takes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._fused_classes import made_from, subclass

_rms_norm = torch.ops.fp8.rms_norm.default
_layer_norm = torch.ops.fp8.layer_norm.default

LAYER = "layer"
SPEC = "fp8_norm"
"""The attribute of a fused module that holds its NormSpec."""


class NormSpec(NamedTuple):
    """What a norm was found to compute, and from what."""

    form: str  # of fp8.ops.rms_norm, or LAYER
    eps: float
    weight: str | None  # names of its parameters
    bias: str | None
    dtypes: tuple[torch.dtype, ...]  # of inputs, for which that was found
    parameter_dtype: torch.dtype | None
    attributes: tuple[tuple[str, Any], ...]  # all that it has beside parameters, as found


NormSpec.__module__, NormSpec.__qualname__ = "fp8.nn", "_NormSpec"  # what pickles name


_classes: dict[type[nn.Module], type[nn.Module]] = {}
_MARK = "_fp8_fused_from"


def original(kind: type) -> type[nn.Module] | None:
    """The class that a fused class was made from; None for any other."""
    return made_from(kind, _MARK)


def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose forward is fused."""
    if base not in _classes:
        _classes[base] = _make(base)
    return _classes[base]


def fused_norm(base: type[nn.Module], *args: Any) -> nn.Module:
    """A fused module without attributes: what pickles and copies begin with."""
    kind: Any = fused_class(base)
    module: nn.Module = kind.__new__(kind, *args)
    return module


fused_norm.__module__, fused_norm.__qualname__ = "fp8.nn", "_fused_norm"


def obstacle(module: Any, x: Any) -> str | None:
    """Why a call of a fused module with x takes the class's own forward; None if it is fused."""
    spec: NormSpec = vars(module)[SPEC]
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return "its input is no plain tensor"
    if x.dtype not in spec.dtypes:
        return f"its input is {str(x.dtype).removeprefix('torch.')}"
    if x.is_nested or not (x.is_cuda or x.is_cpu) or x.dim() == 0:
        return "its input is no dense tensor on a CPU or GPU"
    attributes = vars(module)
    for name, value in spec.attributes:
        if attributes.get(name, _MARK) != value:
            return f"its {name} has changed"
    for parameter_name in (spec.weight, spec.bias):
        if parameter_name is None:
            continue
        parameter = getattr(module, parameter_name, None)
        if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
            return f"its {parameter_name} is no plain parameter"
        if parameter.dtype is not spec.parameter_dtype or parameter.shape != x.shape[-1:]:
            return f"its {parameter_name} has another dtype or shape"
        if parameter.device != x.device:
            return f"its {parameter_name} is on another device"
    return None


def _make(base: type[nn.Module]) -> type[nn.Module]:
    own: Callable[..., Any] = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or base.forward is not own or obstacle(self, args[0]):
            return base.forward(self, *args, **kwargs)
        spec: NormSpec = self.fp8_norm
        weight = None if spec.weight is None else getattr(self, spec.weight)
        if spec.form == LAYER:
            bias = None if spec.bias is None else getattr(self, spec.bias)
            return _layer_norm(args[0], weight, bias, spec.eps)
        return _rms_norm(args[0], weight, spec.eps, spec.form)

    return subclass(base, _MARK, forward, fused_norm)
