"""A linear layer whose weight is FP8."""

from typing import Literal

import torch
from torch import Tensor

_linear_frozen = torch.ops.fp8.linear_frozen.default


def linear_frozen(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    input_granularity: Literal["tensorwise", "rowwise", "blockwise"] | None = None,
    power_of_two: bool = False,
    decode: bool = True,
) -> Tensor:
    """y = x · (weight · weight_scale)ᵀ + bias with a weight that is FP8 already, of a checkpoint or
    made once. x is quantized in the call.

    Args:
        x: [..., K] bfloat16, float16 or float32.
        weight: [N, K] float8_e4m3fn, read where it lies; copied in each call if it is not
            contiguous or N or K is no multiple of 16. No gradient.
        weight_scale: float32, which multiplies: one element of any shape (per tensor); [N], [N, 1]
            or [1, N] (per row); [ceil(N / 128), ceil(K / 128)] (per block of 128 x 128, the last
            ones of any extent). Where a shape could be two of these, input_granularity says which;
            without it one element is the whole weight's. No gradient.
        bias: [N] of x's dtype (under autocast x and bias are cast to the autocast dtype).
        input_scale: one float32 element: a static scale of x, for weights without blocks. Values
            beyond 448 · input_scale saturate, of which dx takes no notice.
        input_granularity: "tensorwise", "rowwise" or "blockwise" (128 elements of a row): what of x
            shares a scale. A weight with blocks takes blockwise, others one of the two others.
            None: blockwise with blocks, tensorwise with an input_scale, else rowwise.
        power_of_two: scales of x, and of dy in the backward, are powers of two.
        decode: multiply up to 64 rows by a kernel made for few, on compute capability 9.0, with a
            weight of 2^20 elements or more and unless x has one dynamic scale; up to 32 rows where
            x and weight have one scale each, or blocks and more than 2^25 elements of weight. Codes
            and scales are the same; sums are added in another order, and up to there a row has the
            same bits whatever the others are.

    Returns: [..., N] in x's dtype; where `fused_linear` would quantize x and weight so, its bits,
    but for few rows with decode. Differentiable once, in x and bias, and nothing of x is saved. dx
    is made of the weight's own codes: dy times the scales of the weight's rows, quantized to e4m3
    with a scale for each row (for 128 elements of a row, with blocks), times the transposed codes,
    of which the backward makes a copy.

    Errors: TypeError (dtypes), ValueError (shapes, devices, options that exclude each other, a
    weight that requires a gradient), NotImplementedError (jvp).

    Example:
        >>> weight = torch.randn(32, 64)
        >>> codes, scale = fp8.ops.quantize_rowwise(weight)
        >>> fp8.ops.linear_frozen(torch.randn(2, 8, 64), codes, scale).shape
        torch.Size([2, 8, 32])
    """
    result: Tensor = _linear_frozen(
        x,
        weight,
        weight_scale,
        bias,
        input_scale,
        input_granularity=input_granularity,
        power_of_two=power_of_two,
        decode=decode,
    )
    return result
