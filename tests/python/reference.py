"""Independent references for the FP8 operators, by exact arithmetic on the CPU.

An fp8 format is a sorted list of at most 127 finite magnitudes. Encoding looks a value up among the
midpoints of that list, in float64, where every fp32 value, every fp8 value and every midpoint is
exact: no bit trick that an implementation would use too. Codes are compared as uint8, since fp8
tensors have no comparison of their own.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
FP8_DTYPES = (E4M3, E5M2)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
NAN_CODE = 0x7F
FLT_MAX = np.float32(np.finfo(np.float32).max)

# (exponent bits, mantissa bits, bias, code of the largest finite magnitude)
_LAYOUT = {E4M3: (4, 3, 7, 0x7E), E5M2: (5, 2, 15, 0x7B)}


@cache
def magnitudes(dtype: torch.dtype) -> np.ndarray:
    """The finite magnitudes, ascending; the index is the code. float64."""
    _, mantissa_bits, bias, largest = _LAYOUT[dtype]
    codes = np.arange(largest + 1)
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / 2.0**mantissa_bits + (exponent > 0)
    return fraction * 2.0 ** (np.maximum(exponent, 1) - bias)


@cache
def midpoints(dtype: torch.dtype) -> np.ndarray:
    """midpoints[i] lies halfway between code i and code i + 1. Exact in float64."""
    values = magnitudes(dtype)
    return (values[1:] + values[:-1]) / 2


def encode(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Codes of `values`: round to nearest, ties to the even code, saturate; NaN is 0x7F. uint8."""
    values = np.asarray(values, dtype=np.float64)
    nan = np.isnan(values)
    magnitude = np.where(nan, 0.0, np.abs(values))
    points = midpoints(dtype)
    code = np.searchsorted(points, magnitude, side="left")  # a tie is still the lower code here
    tie = magnitude == points[np.minimum(code, points.size - 1)]
    code = code + (tie & (code % 2 == 1))
    code = code | np.where(np.signbit(values), 0x80, 0)
    return np.where(nan, NAN_CODE, code).astype(np.uint8)


@cache
def code_values(dtype: torch.dtype) -> np.ndarray:
    """Value of each of the 256 codes, NaN and Inf included. float64."""
    positive = np.full(128, np.nan)
    finite = magnitudes(dtype)
    positive[: finite.size] = finite
    if dtype == E5M2:
        positive[0x7C] = np.inf
    return np.concatenate([positive, -positive])


def codes(data: Tensor) -> Tensor:
    """Codes of an fp8 tensor of any strides, on the CPU. uint8."""
    assert data.dtype in FP8_DTYPES, data.dtype
    return data.view(torch.uint8).cpu().contiguous()


def decode(data: Tensor) -> Tensor:
    """Exact values of an fp8 tensor, on its device. float64."""
    table = torch.from_numpy(code_values(data.dtype)).to(data.device)
    return table[data.view(torch.uint8).long()]


def from_codes(code: Tensor, dtype: torch.dtype) -> Tensor:
    return code.to(torch.uint8).view(dtype)


class Quantized(NamedTuple):
    codes: Tensor  # uint8, shape of x
    scale: Tensor  # float32


def _round_down_to_power_of_two(values: np.ndarray) -> np.ndarray:
    """The largest power of two that is not above; 0, Inf and NaN stay."""
    _, exponent = np.frexp(values)  # values = fraction · 2^exponent, fraction in [0.5, 1)
    rounded = np.ldexp(np.float32(1), exponent - 1)
    return np.where(np.isfinite(values) & (values != 0), rounded, values).astype(np.float32)


def _quantize(
    x: np.ndarray, amax: np.ndarray, dtype: torch.dtype, power_of_two: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale from x (float32) and its groups' amax (float32, broadcasts against x)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        multiplier = np.float32(FP8_MAX[dtype]) / amax
        multiplier = np.where(amax == 0, np.float32(1), multiplier)
        multiplier = np.where(np.isposinf(multiplier), FLT_MAX, multiplier).astype(np.float32)
        if power_of_two:
            multiplier = _round_down_to_power_of_two(multiplier)
        scale = np.float32(1) / multiplier
        product = x * multiplier
        assert product.dtype == np.float32
        assert scale.dtype == np.float32
    return encode(product, dtype), scale


def quantize_tensorwise(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, power_of_two: bool = False
) -> Quantized:
    """scale: 0-dim, static scaling with quant_multiplier 1 / scale."""
    values = x.detach().cpu().float().numpy()
    if scale is not None:
        with np.errstate(all="ignore"):
            product = values * (np.float32(1) / scale.cpu().numpy())
        return Quantized(torch.from_numpy(encode(product, dtype)), scale.cpu())
    amax = np.abs(values).max(initial=0)  # np.max propagates NaN
    code, new_scale = _quantize(values, np.asarray(amax, dtype=np.float32), dtype, power_of_two)
    return Quantized(torch.from_numpy(code), torch.from_numpy(np.asarray(new_scale)))


def quantize_rowwise(x: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Quantized:
    """scale: x.shape[:-1] + [1]."""
    values = x.detach().cpu().float().numpy()
    amax = np.abs(values).max(axis=-1, keepdims=True, initial=0)
    code, scale = _quantize(values, amax, dtype, power_of_two)
    return Quantized(torch.from_numpy(code), torch.from_numpy(scale))


def quantize_blocks(
    x: Tensor, dtype: torch.dtype, block_rows: int, power_of_two: bool = False
) -> Quantized:
    """Blocks of block_rows x 128 of a matrix. scale: [ceil(M / block_rows), ceil(K / 128)]."""
    values = as_matrix(x).detach().cpu().float().numpy()
    rows, cols = values.shape
    down, across = -(-rows // block_rows), -(-cols // 128)
    whole = np.zeros((down * block_rows, across * 128), dtype=np.float32)
    whole[:rows, :cols] = values
    blocks = whole.reshape(down, block_rows, across, 128)
    amax = np.abs(blocks).max(axis=(1, 3), keepdims=True, initial=0)
    code, scale = _quantize(blocks, amax, dtype, power_of_two)
    code = code.reshape(whole.shape)[:rows, :cols].reshape(x.shape)
    return Quantized(torch.from_numpy(code.copy()), torch.from_numpy(scale[:, 0, :, 0].copy()))


def is_blockwise(scale: Tensor, operand: Tensor) -> bool:
    """Whether scales of a matrix can only be read as blocks. Scales [M, 1] are those of rows, which
    up to K = 128 are blocks."""
    return scale.dim() == 2 and tuple(scale.shape) != (operand.shape[0], 1)


def expand_scale(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale for each element of data of this shape; 0-dim and rowwise scales broadcast as they
    are."""
    rows, cols = torch.Size(shape[:-1]).numel(), shape[-1]
    if scale.dim() == 0 or tuple(scale.shape) == (*shape[:-1], 1):
        return scale
    down = 1 if scale.shape[0] == rows else 128
    assert scale.shape == (-(-rows // down), -(-cols // 128)), (scale.shape, shape)
    each = scale.repeat_interleave(down, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return each.reshape(shape)


def dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float(data) · scale in fp32, then rounded to dtype."""
    return (decode(data).cpu().float() * expand_scale(scale.cpu(), data.shape)).to(dtype)


def as_matrix(x: Tensor) -> Tensor:
    """[..., K] -> [M, K], also for empty tensors."""
    rows = 1
    for extent in x.shape[:-1]:
        rows *= extent
    return x.reshape(rows, x.shape[-1])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "tensors") -> None:
    """Equal shape, dtype and bits. Any NaN equals any NaN; of fp8 the codes are compared."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} != {expected.dtype}"
    if actual.dtype in FP8_DTYPES:
        actual, expected = codes(actual), codes(expected)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    same = actual == expected
    if actual.is_floating_point():
        same &= actual.signbit() == expected.signbit()
        same |= actual.isnan() & expected.isnan()
    if not bool(same.all()):
        where = (~same).nonzero()[0].tolist()
        index = tuple(where)
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {where}: "
            f"got {actual[index].item()!r}, expected {expected[index].item()!r}"
        )


def sqnr(actual: Tensor, exact: Tensor) -> float:
    """Signal to quantization noise in dB: 20 log10(|exact| / |actual - exact|)."""
    exact = exact.double()
    noise = (actual.to(exact.device).double() - exact).norm()
    return float(20 * torch.log10(exact.norm() / noise))
