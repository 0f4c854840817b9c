"""Products of quantized matrices."""

import torch
from torch import Tensor

_ops = torch.ops.fp8


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = True,
) -> Tensor:
    """out = (a · scale_a) · (b · scale_b)ᵀ + bias. Both operands are read along K, so b is [N, K]
    as a weight is.

    Args:
        a: [M, K] and b: [N, K], each float8_e4m3fn or float8_e5m2.
        scale_a, scale_b: float32, both 0-dim (tensorwise), [M, 1] and [N, 1] (rowwise), or each in
            blocks: [M, ceil(K / 128)] (1x128) or [ceil(M / 128), ceil(K / 128)] (128x128), and the
            same with N. Two operands in squares have no FP8 matmul: they are multiplied in float32.
        bias: [N] of `out_dtype`, or bfloat16 for a float32 output.
        out_dtype: bfloat16, float16 or float32.
        fast_accum: use the tensor cores' fast accumulation (about 14 mantissa bits); False promotes
            to fp32 in steps. Ignored where there is no such choice: with block scales sums are
            always promoted, every 128 elements.

    Returns: [M, N] `out_dtype`.

    Example:
        >>> a, scale_a = fp8.ops.quantize_rowwise(torch.randn(16, 64))
        >>> b, scale_b = fp8.ops.quantize_rowwise(torch.randn(32, 64))
        >>> fp8.ops.scaled_mm(a, b, scale_a, scale_b).shape
        torch.Size([16, 32])
    """
    result: Tensor = _ops.scaled_mm.default(a, b, scale_a, scale_b, bias, out_dtype, fast_accum)
    return result


def scaled_mm_accumulate_(
    out: Tensor, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, fast_accum: bool = False
) -> Tensor:
    """out += (a · scale_a) · (b · scale_b)ᵀ, in place: a weight gradient added to a main gradient
    in one matmul.

    Args:
        out: [M, N] float32, bfloat16 or float16. Modified.
        a: [M, K], b: [N, K], scale_a, scale_b, fast_accum: as in `scaled_mm`.

    Returns: out.

    Example:
        >>> fp8.ops.scaled_mm_accumulate_(main_grad, dy_t, x_t, scale_dy, scale_x)  # dW += dyᵀ · x
    """
    result: Tensor = _ops.scaled_mm_accumulate_.default(out, a, b, scale_a, scale_b, fast_accum)
    return result
