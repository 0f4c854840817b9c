"""`fp8.MergedLinear`, and when linear layers of one input are computed as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack as _transforms
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..recipe import Recipe
from . import _histories
from ._calls import CALLED
from ._linear import Linear
from ._mlp import differ, is_plain

_merged_linear = torch.ops.fp8.merged_linear.default
_tracing_state: Any = torch._C._get_tracing_state
_has_any_global_hook: Any = nn.modules.module._has_any_global_hook


def merged(x: Tensor, layers: Sequence[Any]) -> list[Tensor] | None:
    """What the layers compute of x, by one operator; None where one of them must be called itself,
    or their recipes, dtypes or devices differ."""
    if type(x) is not Tensor or x.is_nested or x.dim() == 0 or not all(map(is_plain, layers)):
        return None
    if differ(layers) is not None or _has_any_global_hook():
        return None
    if not is_compiling() and _is_watched():
        return None
    weights = [layer._parameters["weight"] for layer in layers]
    k = x.size(-1)
    if x.device != weights[0].device or any(w.size(-1) != k for w in weights):
        return None
    delayed = layers[0].recipe[:7] == "delayed"
    history = _histories.of(layers[0], weights[0]) if delayed else None
    biases = [layer._parameters["bias"] for layer in layers]
    outputs: list[Tensor] = _merged_linear(x, weights, biases, layers[0].recipe, history=history)
    return outputs


def _is_watched() -> bool:
    """Whether torch.func, forward-mode AD or TorchScript's tracer look on: the first two do not
    have the operator's rules, the last cannot write down what it is given."""
    return (
        _transforms() is not None or forward_ad._current_level >= 0 or _tracing_state() is not None
    )


class MergedLinear(nn.Module):
    """Linear layers that read the same input, as one product: see `fp8.ops.merged_linear`.

    Its children are `fp8.Linear` layers, so each has a weight, a bias and their gradients of its
    own. If one of them is more than a plain layer (it has hooks, a parametrization, a static input
    scale, a `main_grad`, or is another module by now), all are called one by one.

    Args:
        in_features: of all of them.
        out_features: of each; or by name, which are the names of the children ("0", "1", ..
            without).
        bias: of all, or of each, in order.
        device, dtype, recipe: as `fp8.Linear` has them.

    Example:
        >>> qkv = fp8.MergedLinear(64, {"q_proj": 64, "k_proj": 16, "v_proj": 16}, bias=False)
        >>> [t.shape[-1] for t in qkv(torch.randn(2, 8, 64))]
        [64, 16, 16]
        >>> list(qkv.state_dict())
        ['q_proj.weight', 'k_proj.weight', 'v_proj.weight']
    """

    __module__ = "fp8.nn"  # what pickles name

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int] | Mapping[str, int],
        bias: bool | Sequence[bool] = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | Recipe = "tensorwise",
    ) -> None:
        super().__init__()
        if not isinstance(out_features, Mapping):
            out_features = {str(i): features for i, features in enumerate(out_features)}
        if not out_features:
            raise ValueError("fp8.MergedLinear: expected out_features of a layer, got none")
        biases = [bias] * len(out_features) if isinstance(bias, bool) else list(bias)
        if len(biases) != len(out_features):
            raise ValueError(
                f"fp8.MergedLinear: expected bias for each of {len(out_features)} layers, "
                f"got {len(biases)}"
            )
        options: dict[str, Any] = {"device": device, "dtype": dtype, "recipe": recipe}
        for (name, features), with_bias in zip(out_features.items(), biases, strict=True):
            self.add_module(name, Linear(in_features, features, with_bias, **options))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., out_features] of each layer for x: [..., in_features]."""
        layers: list[Any] = list(self._modules.values())
        outputs = merged(x, layers) if len(layers) > 1 else None
        if outputs is None:
            return tuple(layer(x) for layer in layers)
        for layer in layers:
            if is_compiling():
                layer._mark_traced()
            else:
                layer.__dict__[CALLED] = True
        return tuple(outputs)
