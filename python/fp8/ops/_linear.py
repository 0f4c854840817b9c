"""The fused linear layer."""

import torch
from torch import Tensor

from .._native import nested
from ..recipe import Recipe

_ops = torch.ops.fp8


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    recipe: str | Recipe = "tensorwise",
    *,
    input_scale: Tensor | None = None,
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
            `fp8.Recipe`. `delayed` keeps a history of amaxes for each weight tensor (README,
            "Delayed scaling").
        input_scale: 0-dim float32 on x's device, for recipes of one scale per tensor: static
            scaling of x, in one pass over it instead of two. Values beyond 448 · input_scale, Inf
            among them, saturate, of which dx takes no notice; NaN stays NaN. weight and dy are
            scaled as without it. No gradient.

    Returns: [..., N] in x's dtype. Gradients: dx in x's dtype, dW in the weight's, db (accumulated
    in fp32) in the bias's. A second derivative raises NotImplementedError.

    Example:
        >>> y = fp8.ops.fused_linear(torch.randn(2, 8, 64), torch.randn(32, 64), torch.zeros(32))
        >>> y.shape
        torch.Size([2, 8, 32])
    """
    if type(x) is not Tensor and x.is_nested:  # jagged; in inference mode it meets no kernel
        return nested.map_rows(
            lambda rows: fused_linear(rows, weight, bias, recipe, input_scale=input_scale), x
        )
    result: Tensor = _ops.fused_linear.default(
        x, weight, bias, str(recipe), input_scale=input_scale
    )
    return result
