"""Typed wrappers of the operators `torch.ops.fp8.*`: what they compute, shapes, errors.

Words: `scale` is the dequantization factor, x ≈ data · scale. e4m3 is torch.float8_e4m3fn (largest
value 448), e5m2 is torch.float8_e5m2 (57344). M tokens, N out-features, K in-features. Every
operator runs on CUDA, CPU and meta tensors; CPU and CUDA quantize to the same bits. Errors are
TypeError (dtypes), ValueError (shapes, devices, unknown recipe) and NotImplementedError (double
backward); each names the operator, what it expected and what came.

Quantization, with amax = max |x| over a scaling group, in fp32:

    quant_multiplier = fp8_max / amax        (1 if amax is 0; at most the largest fp32)
    data = saturate(round_to_nearest_even(float(x) · quant_multiplier))
    scale = 1 / quant_multiplier

With `power_of_two` quant_multiplier is rounded down to a power of two, and scale is one too
(between 2^-127 and 2^120). A NaN or Inf in a group makes the group's scale NaN or Inf, so that
everything computed from the group is non-finite.
"""

import torch
from torch import Tensor

from .recipe import Recipe

__all__ = [
    "dequantize",
    "fused_linear",
    "grouped_linear",
    "moe_experts",
    "quantize_blockwise_1x128",
    "quantize_blockwise_1x128_transpose",
    "quantize_blockwise_128x128",
    "quantize_blockwise_128x128_transpose",
    "quantize_rowwise",
    "quantize_rowwise_transpose",
    "quantize_tensorwise",
    "quantize_tensorwise_transpose",
    "scaled_mm",
    "scaled_mm_accumulate_",
]

_ops = torch.ops.fp8


def quantize_tensorwise(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantize with one scale for the whole tensor.

    Args:
        x: [..., K] bfloat16, float16 or float32, any strides.
        dtype: float8_e4m3fn or float8_e5m2.
        scale: 0-dim float32 for static scaling: quant_multiplier = 1 / scale. Values beyond fp8_max
            · scale, Inf among them, saturate; NaN stays NaN.
        power_of_two: round quant_multiplier down to a power of two. With `scale`: ValueError, a
            given scale is used as it is.

    Returns:
        data: shape of x, `dtype`. If K is not a multiple of 16 its rows are padded in memory with
            zeros.
        scale: 0-dim float32, the given one or 1 / quant_multiplier.

    Example:
        >>> data, scale = fp8.ops.quantize_tensorwise(torch.randn(8, 32))
        >>> x = fp8.ops.dequantize(data, scale, torch.float32)
    """
    result: tuple[Tensor, Tensor] = _ops.quantize_tensorwise.default(
        x, dtype, scale, power_of_two=power_of_two
    )
    return result


def quantize_rowwise(
    x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize with one scale per row, a row being the last dimension.

    Args:
        x: [..., K] bfloat16, float16 or float32, any strides.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two: round each quant_multiplier down to a power of two.

    Returns:
        data: shape of x, `dtype` (rows padded in memory to a multiple of 16).
        scale: [..., 1] float32.

    Example:
        >>> data, scale = fp8.ops.quantize_rowwise(torch.randn(8, 32))
        >>> scale.shape
        torch.Size([8, 1])
    """
    result: tuple[Tensor, Tensor] = _ops.quantize_rowwise.default(
        x, dtype, power_of_two=power_of_two
    )
    return result


def quantize_tensorwise_transpose(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_tensorwise` that also writes the transposed copy, which dgrad and wgrad read.

    Args: as `quantize_tensorwise`. M is the product of x's leading dimensions.

    Returns:
        data: shape of x.
        data_t: [K, M], the same values transposed, rows padded in memory to a multiple of 16.
        scale: 0-dim float32, of both.

    Example:
        >>> data, data_t, scale = fp8.ops.quantize_tensorwise_transpose(torch.randn(8, 32))
        >>> data_t.shape
        torch.Size([32, 8])
    """
    result: tuple[Tensor, Tensor, Tensor] = _ops.quantize_tensorwise_transpose.default(
        x, dtype, scale, power_of_two=power_of_two
    )
    return result


def quantize_rowwise_transpose(
    x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rowwise` of x and of its transpose: two quantizations, each with scales along its
    own rows.

    Args: as `quantize_rowwise`. M is the product of x's leading dimensions.

    Returns:
        data: shape of x, and data_t: [K, M], rows padded in memory to a multiple of 16.
        scale: [..., 1] float32, of data's rows, and scale_t: [K, 1] float32, of data_t's rows.
        In this order: (data, data_t, scale, scale_t).

    Example:
        >>> data, data_t, scale, scale_t = fp8.ops.quantize_rowwise_transpose(torch.randn(8, 32))
        >>> scale_t.shape
        torch.Size([32, 1])
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.quantize_rowwise_transpose.default(
        x, dtype, power_of_two=power_of_two
    )
    return result


def quantize_blockwise_1x128(
    x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize with one scale for 128 elements of a row: activations and gradients in the recipe of
    DeepSeek-V3 (arXiv 2412.19437, section 3.3).

    Args:
        x: [..., K] bfloat16, float16 or float32, any strides. M is the product of its leading
            dimensions.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two: round each quant_multiplier down to a power of two.

    Returns:
        data: shape of x, `dtype` (rows padded in memory to a multiple of 16).
        scale: [M, ceil(K / 128)] float32; the scales of a block of columns lie together in memory
            (strides 1 and M padded to 16), as cuBLASLt reads them.

    Example:
        >>> data, scale = fp8.ops.quantize_blockwise_1x128(torch.randn(8, 256))
        >>> scale.shape
        torch.Size([8, 2])
    """
    result: tuple[Tensor, Tensor] = _ops.quantize_blockwise_1x128.default(
        x, dtype, power_of_two=power_of_two
    )
    return result


def quantize_blockwise_1x128_transpose(
    x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_blockwise_1x128` of x and of its transpose, in one pass: two quantizations, the
    second with one scale for 128 elements of a column of x.

    Args: as `quantize_blockwise_1x128`.

    Returns:
        data: shape of x, and data_t: [K, M], rows padded in memory to a multiple of 16.
        scale: [M, ceil(K / 128)] float32, and scale_t: [K, ceil(M / 128)] float32, of data_t.
        In this order: (data, data_t, scale, scale_t).

    Example:
        >>> quantized = fp8.ops.quantize_blockwise_1x128_transpose(torch.randn(256, 64))
        >>> quantized[3].shape
        torch.Size([64, 2])
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.quantize_blockwise_1x128_transpose.default(
        x, dtype, power_of_two=power_of_two
    )
    return result


def quantize_blockwise_128x128(
    x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize with one scale for a square of 128 x 128 elements: weights in the recipe of
    DeepSeek-V3 (arXiv 2412.19437, section 3.3).

    Args: as `quantize_blockwise_1x128`.

    Returns:
        data: shape of x, `dtype` (rows padded in memory to a multiple of 16).
        scale: [ceil(M / 128), ceil(K / 128)] float32, rows padded in memory to a multiple of four
            scales, as cuBLASLt reads them.

    Example:
        >>> data, scale = fp8.ops.quantize_blockwise_128x128(torch.randn(384, 256))
        >>> scale.shape
        torch.Size([3, 2])
    """
    result: tuple[Tensor, Tensor] = _ops.quantize_blockwise_128x128.default(
        x, dtype, power_of_two=power_of_two
    )
    return result


def quantize_blockwise_128x128_transpose(
    x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_blockwise_128x128` that also writes the transposed copy: the same squares, so the
    same values and the same scales.

    Args: as `quantize_blockwise_1x128`.

    Returns:
        data: shape of x, and data_t: [K, M], rows padded in memory to a multiple of 16.
        scale: [ceil(M / 128), ceil(K / 128)] float32, and scale_t: its transpose, in memory as a
            matmul reads it with data_t. In this order: (data, data_t, scale, scale_t).

    Example:
        >>> quantized = fp8.ops.quantize_blockwise_128x128_transpose(torch.randn(384, 256))
        >>> quantized[3].shape
        torch.Size([2, 3])
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = (
        _ops.quantize_blockwise_128x128_transpose.default(x, dtype, power_of_two=power_of_two)
    )
    return result


def dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x = float(data) · scale, rounded to `dtype`.

    Args:
        data: [..., K] float8_e4m3fn or float8_e5m2, any strides.
        scale: float32, what a quantize operator returned: 0-dim, [..., 1], or in blocks
            [M, ceil(K / 128)] or [ceil(M / 128), ceil(K / 128)] with M the product of data's
            leading dimensions. Where two of these are one shape they mean the same.
        dtype: bfloat16, float16 or float32.

    Returns: shape of data, `dtype`.

    Example:
        >>> fp8.ops.dequantize(*fp8.ops.quantize_rowwise(torch.ones(1, 4)))
        tensor([[1., 1., 1., 1.]], dtype=torch.bfloat16)
    """
    result: Tensor = _ops.dequantize.default(data, scale, dtype)
    return result


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
            included.
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
    result: Tensor = _ops.fused_linear.default(
        x, weight, bias, str(recipe), input_scale=input_scale
    )
    return result


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    recipe: str = "rowwise",
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
        recipe: one of `fp8.GROUPED_RECIPES`.

    Returns: [T, N] in x's dtype. On a GPU products are made in bfloat16 and cast. Offsets that
    descend or exceed T give undefined values, and are not noticed.

    Example:
        >>> offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
        >>> y = fp8.ops.grouped_linear(torch.randn(8, 64), torch.randn(3, 32, 64), offsets)
        >>> y.shape
        torch.Size([8, 32])
    """
    result: Tensor = _ops.grouped_linear.default(x, weight, offsets, bias, recipe)
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
    recipe: str = "rowwise",
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
        recipe: one of `fp8.GROUPED_RECIPES`.

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
        recipe,
    )
    return result
