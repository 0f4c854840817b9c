"""The fused linear layer."""

import torch
from torch import Tensor

from .._native import nested
from ..recipe import Recipe

_ops = torch.ops.fp8
_HISTORY_SIZE: int = _ops._amax_history_size()


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    recipe: str | Recipe = "tensorwise",
    *,
    input_scale: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """y = x · weightᵀ + bias in FP8, differentiable once: quantize, matmul and dequantize as one
    operator each way.

    Args:
        x: [..., K] bfloat16, float16 or float32; any leading dimensions, none and empty ones
            included. Or a nested tensor, jagged or strided, whose members are such: they are the
            rows of one call, and the result is nested as x is.
        weight: [N, K] and bias: [N], of x's dtype (under autocast all are cast to the autocast
            dtype).
        recipe: a key of `fp8.RECIPES`, with options in a string ("rowwise:power_of_two") or as an
            `fp8.Recipe`.
        input_scale: 0-dim float32 on x's device, for recipes of one scale per tensor: static
            scaling of x, in one pass over it instead of two. Values beyond 448 · input_scale, Inf
            among them, saturate, of which dx takes no notice; NaN stays NaN. weight and dy are
            scaled as without it. No gradient.
        history: of `make_history`, for the recipe `delayed` (docs/recipes.md): of the
            calls with one weight, as a layer makes them. The call and its backward write it;
            results and the next history depend on the arguments alone. Without a history `delayed`
            is `tensorwise`.

    Returns: [..., N] in x's dtype. Gradients: dx in x's dtype, dW in the weight's, db (accumulated
    in fp32) in the bias's. A second derivative raises NotImplementedError.

    Example:
        >>> y = fp8.ops.fused_linear(torch.randn(2, 8, 64), torch.randn(32, 64), torch.zeros(32))
        >>> y.shape
        torch.Size([2, 8, 32])
    """
    if type(x) is not Tensor and x.is_nested:  # jagged; in inference mode it meets no kernel
        return nested.map_rows(
            lambda rows: fused_linear(
                rows, weight, bias, recipe, input_scale=input_scale, history=history
            ),
            x,
        )
    result: Tensor = _ops.fused_linear.default(
        x, weight, bias, str(recipe), input_scale=input_scale, history=history
    )
    return result


def make_history(device: torch.device | str | int | None = None) -> Tensor:
    """An empty history for `fused_linear` with the recipe `delayed`: [3, n] int32 on `device`.

    One row each of x, weight and dy. No part of what a model has learned: it makes scales better or
    worse within a stated bound, and never wrong (docs/guarantees.md), and may begin anew at any
    time. fp8.Linear has one as a buffer.

    Example:
        >>> x, weight = torch.randn(8, 64), torch.randn(32, 64)
        >>> history = fp8.ops.make_history()
        >>> y = fp8.ops.fused_linear(x, weight, None, "delayed", history=history)
    """
    return torch.zeros(3, _HISTORY_SIZE, dtype=torch.int32, device=device)
