"""The experts of a mixture whose weights are FP8."""

from typing import Literal

import torch
from torch import Tensor

_experts_frozen = torch.ops.fp8.experts_frozen.default


def experts_frozen(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    *,
    input_granularity: Literal["rowwise", "blockwise"] | None = None,
    power_of_two: bool = False,
) -> Tensor:
    """`moe_experts` with weights that are FP8 already, of a checkpoint or made once. x, and what is
    between the two products, is quantized in the call; the weights of experts that get no token are
    not read.

    Args:
        x: [T, H] bfloat16, float16 or float32.
        top_k_index: [T, k] int64, experts; ids outside [0, E) contribute nothing.
        top_k_weights: [T, k], any of the three dtypes.
        gate_up: [E, 2 I, H] and down: [E, H, I] float8_e4m3fn, read where they lie; copied in each
            call if they are not contiguous. H and I are multiples of 16, E at most 1023. No
            gradient.
        gate_up_scale, down_scale: float32, which multiply. Of a weight [E, N, K]: one per expert
            ([E], [E, 1] or [E, 1, 1]) or per row ([E, N] or [E, N, 1]); or, of both weights, one
            per block of 128 x 128 ([E, ceil(N / 128), ceil(K / 128)]). No gradient.
        gate_up_bias: [E, 2 I] and down_bias: [E, H] of x's dtype (under autocast x and biases are
            cast to the autocast dtype).
        activation, interleaved, alpha, limit: as in `moe_experts`.
        input_granularity: "rowwise" or "blockwise" (128 elements of a row): what of x shares a
            scale. Weights with blocks take blockwise, others rowwise; it says which where [E, 1, 1]
            could be both. None: blockwise where both scales can be of blocks.
        power_of_two: scales of x, and of what is quantized in the backward, are powers of two.

    Returns: [T, H] in x's dtype; where `moe_experts` would quantize the weights so (recipes
    "rowwise" and "blockwise"), its bits. Deterministic. Differentiable once, in x, top_k_weights
    and biases; kept for the backward are the first product and the routing. Gradients are made of
    the weights' own codes: rows times the scales of the weight's out-features, quantized to e4m3
    with a scale for each row (for 128 elements of a row, with blocks), times the transposed codes,
    of which each backward makes a copy.

    Errors: TypeError (dtypes), ValueError (shapes, devices, weights that require a gradient),
    NotImplementedError (jvp).

    Example:
        >>> gate_up, gate_up_scale = fp8.ops.quantize_rowwise(torch.randn(3 * 64, 16))
        >>> down, down_scale = fp8.ops.quantize_rowwise(torch.randn(3 * 16, 32))
        >>> weights, index = torch.rand(8, 3).topk(2)
        >>> fp8.ops.experts_frozen(
        ...     torch.randn(8, 16), index, weights,
        ...     gate_up.view(3, 64, 16), gate_up_scale.view(3, 64, 1),
        ...     down.view(3, 16, 32), down_scale.view(3, 16, 1),
        ... ).shape
        torch.Size([8, 16])
    """
    result: Tensor = _experts_frozen(
        x,
        top_k_index,
        top_k_weights,
        gate_up,
        gate_up_scale,
        down,
        down_scale,
        gate_up_bias,
        down_bias,
        activation,
        interleaved,
        alpha,
        limit,
        input_granularity=input_granularity,
        power_of_two=power_of_two,
    )
    return result
