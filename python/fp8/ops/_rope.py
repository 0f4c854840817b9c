"""Rotary position embedding of queries and keys."""

from typing import overload

import torch
from torch import Tensor

_ops = torch.ops.fp8


@overload
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "halves",
    rotary_dim: int | None = None,
    rounding: str = "each",
) -> tuple[Tensor, Tensor]: ...


@overload
def rope(
    q: Tensor,
    k: None,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "halves",
    rotary_dim: int | None = None,
    rounding: str = "each",
) -> tuple[Tensor, None]: ...


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "halves",
    rotary_dim: int | None = None,
    rounding: str = "each",
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding of q and k in one pass, forward and backward: each pair (a, b) of a
    row becomes (a · cos - b · sin, b · cos + a · sin). Out of place, differentiable any number of
    times. Values and gradients have the bits of the formulas below in eager PyTorch.

    `layout` says which columns, of R that are rotated, are a pair, i < R / 2:

        "halves"                 i and i + R / 2: x · cos + rotate_half(x) · sin, as Llama has it
        "interleaved"            2 i and 2 i + 1: GPT-J, GLM, Cohere
        "interleaved_to_halves"  read as "interleaved", written as "halves": DeepSeek V3

    `rounding` says where results are rounded, T being the dtype of q and k:

        "each"  every product and the sum, to the wider dtype of x and cos, which is that of the
                results: x · cos + rotate(x) · sin
        "sum"   the sum, to T; in the gradient the products too:
                (x.float() · cos + rotate(x).float() · sin).to(T)
        "once"  the sum, to T, and each gradient once:
                x = x.float(); (x · cos + rotate(x) · sin).to(T)

    Args:
        q: [..., D] bfloat16, float16 or float32, of 1 to 4 dimensions and any strides; [B, H, S, D]
            as a transposed view of a projection's [B, S, H · D] is read where it lies, if its
            columns are contiguous. Else it is copied first.
        k: the same, of q's dtype and D; its other sizes may differ. None: q alone.
        cos, sin: broadcast to q[..., :R] and to k[..., :R], without gradients: [S, R], or what a
            Hugging Face model has, [B, S, R], as cos.unsqueeze(1). Or with R / 2 columns, one for
            each pair. In T or float32. With R columns they lie in a row as x does.
        layout: see above.
        rotary_dim: R, even; None: the columns of cos. Columns of x from R on are copied.
        rounding: see above.

    Returns: q and k rotated, None where k is. Their dimensions lie in memory in the order of q's
    and k's, and so do the gradients.

    Example:
        >>> angles = torch.outer(torch.arange(8.0), 10000 ** (-torch.arange(0, 64, 2) / 64))
        >>> angles = torch.cat((angles, angles), -1)
        >>> q, k = torch.randn(2, 4, 8, 64), torch.randn(2, 2, 8, 64)
        >>> q, k = fp8.ops.rope(q, k, angles.cos(), angles.sin())
    """
    options = {"layout": layout, "rotary_dim": rotary_dim, "rounding": rounding}
    result: tuple[Tensor, Tensor] = _ops.rope.default(q, k, cos, sin, **options)
    return result if k is not None else (result[0], None)
