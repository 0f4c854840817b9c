"""`fp8.GatedMLP` and `fp8.MLP`: the feed-forward block of a transformer as one node of the graph.

Their children are `fp8.Linear` layers under the names that models use, so their state_dicts are
those of the modules they stand for. A child that is more than a plain layer (one with hooks, a
wrapper's forward, a parametrization, a static input scale or a `main_grad`) is called instead of
passed by: then the block computes layer by layer, with the same values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from ..recipe import Recipe
from . import _histories
from ._calls import CALLED, called_through
from ._linear import Linear
from ._watched import WatchedParameter

_mlp = torch.ops.fp8.mlp.default
_has_any_global_hook: Any = nn.modules.module._has_any_global_hook

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: torch.square(F.relu(x)),
}
SAVES = ("bf16", "fp8", "recompute")
"""What may be kept of gate and up for the backward: `save` of `fp8.ops.mlp`."""


def check_save(who: str, save: object) -> None:
    """Raises ValueError, in the name of `who`, for what is none of SAVES."""
    if save not in SAVES:
        raise ValueError(f"{who}: expected save out of {[*SAVES]}, got {save!r}")


def is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` does nothing but fused_linear on its parameters."""
    return more_than_plain(layer) is None


def more_than_plain(layer: nn.Module) -> str | None:
    """What a call of `layer` does beside fused_linear on its parameters; None for nothing."""
    if type(layer) is not Linear:
        return "is no fp8.Linear"
    if (more := called_through(layer)) is not None:
        return more
    weight = layer._parameters.get("weight")  # none where it is parametrized
    if type(weight) is not nn.Parameter and type(weight) is not WatchedParameter:
        return "has a weight that is no plain parameter"
    bias = layer._parameters.get("bias", layer)
    if bias is not None and type(bias) is not nn.Parameter:
        return "has a bias that is no plain parameter"
    if getattr(weight, "main_grad", None) is not None:
        return "has a main_grad"
    if layer._buffers.get("input_scale") is not None:
        return "has a static input_scale"
    return None


def differ(layers: Sequence[Any]) -> str | None:
    """In what plain layers differ that one node must have in common; None for nothing."""
    first = layers[0]
    weight = first._parameters["weight"]  # an attribute of a module takes longer
    for layer in layers[1:]:
        other = layer._parameters["weight"]
        if layer.recipe != first.recipe:
            return "recipe"
        if other.dtype is not weight.dtype:
            return "dtype"
        if other.device != weight.device:
            return "device"
    return None


def fused(
    x: Tensor,
    gate: nn.Module,
    up: nn.Module | None,
    down: nn.Module,
    activation: str,
    save: str = "bf16",
    **options: Any,
) -> Tensor | None:
    """The block as one node, or None where a layer must be called itself, or their recipes, dtypes
    or devices differ. options: further ones of `fp8.ops.mlp`."""
    layers: Sequence[Any] = [gate, down] if up is None else [gate, up, down]
    if type(x) is not Tensor or not all(map(is_plain, layers)):
        return None
    if differ(layers) is not None or _has_any_global_hook():
        return None
    weights = [layer._parameters["weight"] for layer in layers]
    if x.device != weights[0].device:
        return None
    histories = {}
    if layers[0].recipe[:7] == "delayed":
        names = ("gate", "down") if up is None else ("gate", "up", "down")
        histories = {
            f"{name}_history": _histories.of(layer, layer.weight)
            for name, layer in zip(names, layers, strict=True)
        }
    for layer in layers:
        if is_compiling():
            layer._mark_traced()
        else:
            layer.__dict__[CALLED] = True
    y: Tensor = _mlp(
        x,
        weights[0],
        None if up is None else weights[1],
        weights[-1],
        activation=activation,
        recipe=layers[0].recipe,
        gate_bias=layers[0]._parameters["bias"],
        up_bias=None if up is None else layers[1]._parameters["bias"],
        down_bias=layers[-1]._parameters["bias"],
        save=save,
        **options,
        **histories,
    )
    return y


class _Block(nn.Module):
    """What the two share."""

    def __init__(self, activation: str, save: str) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"fp8.{type(self).__name__}: expected an activation out of "
                f"{sorted(_ACTIVATIONS)}, got {activation!r}"
            )
        check_save(f"fp8.{type(self).__name__}", save)
        self.activation = activation
        self.save = save

    def extra_repr(self) -> str:
        """The activation, and what is saved if that is not the default."""
        saved = "" if self.save == "bf16" else f", save={self.save}"
        return f"activation={self.activation}{saved}"


class GatedMLP(_Block):
    """y = down_proj(act(gate_proj(x)) · up_proj(x)): see `fp8.ops.mlp`.

    Args:
        hidden, intermediate: features of x and y, and between the products.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "relu_squared".
        bias: of all three layers.
        device, dtype, recipe: as `fp8.Linear` has them.
        save: what the backward finds of gate and up: "bf16", "fp8" (codes: 2 bytes a feature and
            token less, and their rounding in the gradients), or "recompute" (one more product each,
            and 4 bytes less).

    Example:
        >>> block = fp8.GatedMLP(64, 192)
        >>> block(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    __module__ = "fp8.nn"  # what pickles name

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        activation: str = "silu",
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | Recipe = "tensorwise",
        save: str = "bf16",
    ) -> None:
        super().__init__(activation, save)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "recipe": recipe}
        self.gate_proj = Linear(hidden, intermediate, bias, **options)
        self.up_proj = Linear(hidden, intermediate, bias, **options)
        self.down_proj = Linear(intermediate, hidden, bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """y: [..., hidden] for x: [..., hidden]."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        y = fused(x, gate, up, down, self.activation, self.save)
        if y is None:
            y = down(_ACTIVATIONS[self.activation](gate(x)) * up(x))
        return y


class MLP(_Block):
    """y = fc2(act(fc1(x))): see `fp8.ops.mlp`.

    Args:
        hidden, intermediate, activation, bias, device, dtype, recipe, save: as `GatedMLP` has
            them; `activation` is "gelu" and `bias` True by default.

    Example:
        >>> block = fp8.MLP(64, 256)
        >>> block(torch.randn(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    __module__ = "fp8.nn"  # what pickles name

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        activation: str = "gelu",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | Recipe = "tensorwise",
        save: str = "bf16",
    ) -> None:
        super().__init__(activation, save)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "recipe": recipe}
        self.fc1 = Linear(hidden, intermediate, bias, **options)
        self.fc2 = Linear(intermediate, hidden, bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """y: [..., hidden] for x: [..., hidden]."""
        y = fused(x, self.fc1, None, self.fc2, self.activation, self.save)
        if y is None:
            y = self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))
        return y
