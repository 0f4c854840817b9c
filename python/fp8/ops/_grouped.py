"""Linear layers over groups of rows, and the experts of a mixture."""

import torch
from torch import Tensor

from ..recipe import DEFAULT_GROUPED_RECIPE, Recipe

_ops = torch.ops.fp8


def grouped_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = True,
) -> Tensor:
    """Products of quantized matrices over groups of rows, or of columns, whose extents stay on the
    device. No gradient: `grouped_linear` has one.

    Groups of rows: out[r] = (a[r] · scale_a[r]) · (b[g] · scale_b[g])ᵀ for each row r of group g.
    Groups of columns, as in a weight gradient: out[g] = a[:, g] · b[:, g]ᵀ, with the scales of g.

    Args:
        a: [R, K] float8_e4m3fn, rows sorted by group; for columns [M, L].
        b: [E, N, K] float8_e4m3fn, E at most 1023; for columns [N, L].
        scale_a, scale_b: float32, both 0-dim (tensorwise), [R, 1] and [E, N, 1] (rowwise), or in
            blocks [R, ceil(K / 128)] (1x128) and [E, ceil(N / 128), ceil(K / 128)] (128x128). For
            columns [E, M] and [E, N].
        offsets: [E] int32, the row or column that ends each group, ascending. Groups of rows have
            any extent, also none. Groups of columns have a multiple of 32, and at least that, with
            codes of zero beyond their own.
        out_dtype: bfloat16, float16 or float32.
        fast_accum: as in `scaled_mm`; False promotes sums to float32 every 128 elements, as is
            always done with scales in blocks.

    Returns: [R, N] in `out_dtype`, zeros in rows past the last offset; for columns [E, M, N].
    Offsets that descend or exceed R or L give undefined values, and are not noticed.

    On Hopper a kernel of fp8's own runs. Elsewhere it is ATen's, which rounds to bfloat16 first;
    with scales in blocks operands are multiplied in float32, which waits for the offsets.

    Example:
        >>> a, scale_a = fp8.ops.quantize_rowwise(torch.randn(8, 64))
        >>> b, scale_b = fp8.ops.quantize_rowwise(torch.randn(3, 32, 64))
        >>> offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
        >>> fp8.ops.grouped_mm(a, b, scale_a, scale_b, offsets).shape
        torch.Size([8, 32])
    """
    result: Tensor = _ops.grouped_mm.default(a, b, scale_a, scale_b, offsets, out_dtype, fast_accum)
    return result


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    recipe: str | Recipe = DEFAULT_GROUPED_RECIPE,
) -> Tensor:
    """y[r] = x[r] · weight[g]ᵀ + bias[g] for each row r of group g, in FP8, differentiable once.

    Nothing waits for the extents of the groups: they stay on the device. Groups may have any
    extent, also none.

    Args:
        x: [T, K] bfloat16, float16 or float32, rows sorted by group.
        weight: [E, N, K] of x's dtype, E at most 1023; stored so, or as [E, K, N] and transposed
            (its gradient is stored the same way). N and K that are multiples of 16 avoid copies.
        offsets: [E] int32 on x's device: the row that ends each group, so ascending and at most T.
            Rows past the last one give zeros and get a gradient of zeros.
        bias: [E, N] of x's dtype.
        recipe: out of `fp8.GROUPED_RECIPES`, with options in a string ("rowwise:power_of_two") or
            as an `fp8.Recipe`.

    Returns: [T, N] in x's dtype. On GPUs other than Hopper products are made in bfloat16 and
    cast. Offsets that descend or exceed T give undefined values, and are not noticed.

    Example:
        >>> offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
        >>> y = fp8.ops.grouped_linear(torch.randn(8, 64), torch.randn(3, 32, 64), offsets)
        >>> y.shape
        torch.Size([8, 32])
    """
    result: Tensor = _ops.grouped_linear.default(x, weight, offsets, bias, str(recipe))
    return result


def moe_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    recipe: str | Recipe = DEFAULT_GROUPED_RECIPE,
) -> Tensor:
    """The experts of a mixture, with the routing given, in FP8; differentiable once, deterministic.

        g = x[t] · gate_up[e]ᵀ + gate_up_bias[e]
        h = act(gate) · up          with gate and up the halves of g
        y[t] = Σ over the k experts e of t:  weight · (h · down[e]ᵀ + down_bias[e])

    Sorting, gathering, activation, weighting and summing are fused with the quantizations around
    the grouped products. Kept for the backward: x, g and the routing.

    Args:
        x: [T, H] bfloat16, float16 or float32.
        top_k_index: [T, k] int64, experts. Ids outside [0, E) (sentinels of expert parallelism)
            contribute nothing.
        top_k_weights: [T, k], any of the three dtypes.
        gate_up: [E, 2 I, H] and down: [E, H, I] of x's dtype, stored so or with the last two
            dimensions exchanged and transposed. H and I are multiples of 16 (`grouped_linear` takes
            others).
        gate_up_bias: [E, 2 I] and down_bias: [E, H] of x's dtype.
        activation: "silu", "gelu", "gelu_tanh", or "clamped_silu" (gpt-oss): gate = min(gate,
            limit), up = clamp(up, ±limit), h = gate · sigmoid(alpha · gate) · (up + 1).
        interleaved: gate and up are the even and odd elements of g instead of its halves.
        alpha, limit: of "clamped_silu".
        recipe: out of `fp8.GROUPED_RECIPES`, with options in a string ("rowwise:power_of_two") or
            as an `fp8.Recipe`.

    Returns: [T, H] in x's dtype. Gradients for x, top_k_weights, both weights and both biases.

    Example:
        >>> weights, index = torch.randn(8, 4).softmax(-1).topk(2)
        >>> gate_up, down = torch.randn(4, 64, 16), torch.randn(4, 16, 32)
        >>> fp8.ops.moe_experts(torch.randn(8, 16), index, weights, gate_up, down).shape
        torch.Size([8, 16])
    """
    result: Tensor = _ops.moe_experts.default(
        x,
        top_k_index,
        top_k_weights,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        activation,
        interleaved,
        alpha,
        limit,
        str(recipe),
    )
    return result
