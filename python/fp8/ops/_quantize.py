"""Quantize operators and dequantize; see `fp8.ops` for words and formulas."""

import torch
from torch import Tensor

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
