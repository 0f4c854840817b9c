"""Linear layers of one input as one operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..recipe import Recipe

_ops = torch.ops.fp8


def merged_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    recipe: str | Recipe = "tensorwise",
    *,
    history: Tensor | None = None,
) -> list[Tensor]:
    """y_i = x · weights[i]ᵀ + biases[i] in FP8, all of them in one product, differentiable once.

    For layers that read the same x, as q, k and v of attention or gate and up of an MLP. Values and
    gradients are, bit for bit, those of `fused_linear` with the weights one below the other as one
    weight, its y split; but nothing is copied together in high precision, and parameters and their
    gradients stay apart. Against layers of their own: x is quantized once; dx comes from one
    product and is rounded once, where several gradients would be added; with one scale per tensor
    the weights share theirs (that of the largest), and so do the gradients of the results. With a
    scale per row the y_i have the bits of layers of their own.

    Args:
        x: [..., K] bfloat16, float16 or float32; any leading dimensions, none and empty ones
            included.
        weights: 1 to 62 of [N_i, K], of x's dtype (under autocast all are cast to the autocast
            dtype). Up to four are quantized where they lie, on a GPU if they are of 16 bits, with
            rows on 16 bytes; others are copied together first.
        biases: [N_i] or None each; or None, for no biases.
        recipe: as `fused_linear` takes it. With an unquantized weight gradient (`_gw_hp`) that is a
            product for each weight.
        history: of `make_history`, for the recipe `delayed`: one for all of them.

    Returns: y_i [..., N_i] in x's dtype. They are columns of one tensor: the distance from row to
    row is that of all columns; with gradients, one of at most a quarter of all columns has memory
    of its own, so that keeping it keeps no other. Each is a tensor of its own to autograd, with its
    own version, and may be modified in place. One that no gradient reaches is left out of the
    backward, and so is a frozen weight: its gradient is None, not zeros. Gradients of the weights
    share memory, too. A second derivative raises.

    Example:
        >>> q, k = fp8.ops.merged_linear(torch.randn(2, 64), [torch.randn(n, 64) for n in (32, 16)])
        >>> q.shape, k.shape
        (torch.Size([2, 32]), torch.Size([2, 16]))
    """
    results: list[Tensor] = _ops.merged_linear.default(
        x, weights, biases, str(recipe), history=history
    )
    return results
