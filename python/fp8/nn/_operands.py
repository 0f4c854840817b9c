"""fp8.Linear's forward where its input or weight is no plain tensor.

Proxies of torch.fx, nested tensors, and weights that something else has turned into a subclass of
Tensor. Everything here costs the usual call two comparisons of types.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .._native import nested
from . import _histories, _main_grad
from ._watched import WatchedParameter

if TYPE_CHECKING:
    from ._linear import Linear

_fused_linear = torch.ops.fp8.fused_linear.default


def linear(layer: "Linear", input: Any, scale: Tensor | None) -> Any:
    """What `layer`, whose input has this static scale, makes of `input`."""
    if isinstance(input, fx.Proxy):
        return _traced(layer, input.tracer, input, scale)
    if isinstance(input, Tensor) and input.is_nested:
        return nested.map_rows(lambda rows: linear(layer, rows, scale), input)
    weight: Any = layer.weight
    if isinstance(weight, fx.Proxy):  # traced, of an input that is a constant
        return _traced(layer, weight.tracer, input, scale)
    if type(weight) in (nn.Parameter, Tensor, WatchedParameter):
        return _product(layer, input, weight, scale)
    try:
        return _product(layer, input, weight, scale)
    except (NotImplementedError, TypeError, ValueError) as error:
        if _is_torchs(type(weight)) or _is_usual(weight):
            raise
        kind = f"{type(weight).__module__}.{type(weight).__qualname__}"
        raise TypeError(
            f"fp8.Linear: expected a plain tensor as weight, got {kind} ({weight.dtype}), of "
            "another library that quantizes or wraps weights: call fp8.revert(model) first, now or "
            "before that library changes the model; then the layer is an nn.Linear"
        ) from error


def _product(layer: "Linear", input: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """As in Linear.forward."""
    history = _histories.of(layer, layer.weight) if layer.recipe[:7] == "delayed" else None
    buffer = getattr(weight, "main_grad", None)
    if buffer is not None:
        return _main_grad.linear(input, weight, layer.bias, layer.recipe, buffer, scale, history)
    y: Tensor = _fused_linear(
        input, weight, layer.bias, layer.recipe, input_scale=scale, history=history
    )
    return y


def _traced(layer: "Linear", tracer: Any, input: Any, scale: Tensor | None) -> Any:
    """Under torch.fx.symbolic_trace: a call of this module, as nn.Linear is traced.

    So the traced model has the layer itself, with its recipe and whatever scale or main_grad it has
    when it runs. Not where hooks ran before this, and are in the graph already, nor where the
    tracer does not know the module under a name: then it is a call of the operator.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    if not any(hooks) and not layer._backward_pre_hooks:
        root = getattr(tracer, "root", None)
        names = root.named_modules() if isinstance(root, nn.Module) else ()
        name = next((name for name, module in names if module is layer), "")
        if name:
            return tracer.create_proxy("call_module", name, (input,), {})
    history = layer._buffers.get(_histories.NAME)
    return _fused_linear(
        input, layer.weight, layer.bias, layer.recipe, input_scale=scale, history=history
    )


def _is_torchs(kind: type) -> bool:
    """DTensor, FakeTensor and their like, whose own errors say more."""
    return kind.__module__.partition(".")[0] == "torch"


def _is_usual(weight: Tensor) -> bool:
    """A subclass that only adds to a Parameter: what went wrong has another cause."""
    plain = type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
