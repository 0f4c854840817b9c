"""Values in fp64, each with the largest error that the operators may make there.

`Approx` is a result: value, and error, so that |computed - value| ≤ error. Where the error is
infinite anything may come out (a sum beyond fp32's range), where the value is not finite something
not finite must. `Operand` is the same after quantization, as a product reads it. An operand made
of exact values is quantized by the reference, to the bit, and has no error at all; one that is made
of results has that of its elements, and half a step of the format.

The bounds of sums are those of ../python/bounds.py. Beyond them: scales that underflow when they
are multiplied lose half of fp32's smallest number (a GPU may flush: of its smallest normal one)
times the codes that they scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import bounds
import reference
import torch
from bounds import Accumulation
from reference import E4M3, E5M2, FP8_MAX
from torch import Tensor

_U = 2.0**-24
_FLT_MAX = float(torch.finfo(torch.float32).max)
# Half a step between codes: relative to a normal number, and of subnormal ones, at scale 1.
_STEP = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}


class Approx(NamedTuple):
    value: Tensor  # float64
    error: Tensor  # float64

    def t(self) -> Approx:
        return Approx(self.value.t(), self.error.t())

    def rows(self, which: slice | Tensor) -> Approx:
        return Approx(self.value[which], self.error[which])

    def is_exact(self) -> bool:
        return not bool(self.error.any())

    def largest(self) -> Tensor:
        """Of each element the largest magnitude that it may have."""
        return self.value.abs() + self.error


class Operand(NamedTuple):
    value: Tensor  # [rows, K] float64: data · scale
    error: Tensor  # [rows, K]
    scale: Tensor  # [rows, 1]: a row's largest
    largest_code: float


def approx(value: Tensor, error: Tensor) -> Approx:
    """Where the value is not finite there is no error to speak of; an unknown error is infinite."""
    error = torch.where(value.isfinite(), error.nan_to_num(nan=math.inf, posinf=math.inf), 0.0)
    return Approx(value, error)


def exact(x: Tensor) -> Approx:
    value = x.detach().cpu().double()
    return Approx(value, torch.zeros_like(value))


def rounded(a: Approx, dtype: torch.dtype) -> Approx:
    """Stored in dtype; beyond its range anything."""
    half_ulp, half_smallest = bounds._ROUNDING[dtype]
    largest = a.largest()
    error = a.error + half_ulp * largest + half_smallest
    beyond = largest > torch.finfo(dtype).max * (1 - 2 * half_ulp)
    return approx(a.value, torch.where(beyond, math.inf, error))


def plus(a: Approx, b: Approx) -> Approx:
    """In fp32."""
    error = a.error + b.error + _U * (a.largest() + b.largest())
    return _in_fp32(a.value + b.value, error)


def times(a: Approx, b: Approx) -> Approx:
    """Element by element, in fp32."""
    error = a.value.abs() * b.error + a.error * b.largest()
    return _in_fp32(a.value * b.value, error + 2 * _U * a.largest() * b.largest() + 2.0**-149)


def _in_fp32(value: Tensor, error: Tensor) -> Approx:
    beyond = value.abs() + error > 0.99 * _FLT_MAX
    return approx(value, torch.where(beyond, math.inf, error))


def total(a: Approx, dim: int = 0) -> Approx:
    """A sum in fp32, in any order."""
    value, magnitude = a.value.sum(dim), a.largest().sum(dim)
    error = a.error.sum(dim) + (a.value.shape[dim] + 1) * _U * magnitude
    return approx(value, torch.where(magnitude > _FLT_MAX, math.inf, error))


# --- quantization ---


def _exactly(
    x: Tensor, granularity: str, dtype: torch.dtype, power_of_two: bool, scale: Tensor | None
) -> Operand:
    if granularity == "tensor":
        made = reference.quantize_tensorwise(x, dtype, scale, power_of_two)
    elif granularity == "rows":
        made = reference.quantize_rowwise(x, dtype, power_of_two)
    else:
        rows = 128 if granularity == "squares" else 1
        made = reference.quantize_blocks(x, dtype, rows, power_of_two)
    return operand(reference.from_codes(made.codes, dtype), made.scale)


def operand(data: Tensor, scale: Tensor) -> Operand:
    """Of given codes [rows, K] and a scale of any granularity."""
    data, scale = reference.from_codes(reference.codes(data), data.dtype), scale.cpu()
    each = reference.expand_scale(scale, tuple(data.shape)).double().expand(data.shape)
    rows = data.shape[0]
    row_scale = each.abs().amax(1, keepdim=True) if data.numel() else torch.ones(rows, 1).double()
    value = reference.decode(data) * each
    return Operand(value, torch.zeros_like(value), row_scale, FP8_MAX[data.dtype])


def _of_block(t: Tensor, block: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """reduce(a block of a row), for each element of it."""
    if t.numel() == 0:
        return t
    return torch.cat([reduce(part).expand_as(part) for part in t.split(block, 1)], 1)


def _nearly(a: Approx, dtype: torch.dtype, granularity: str) -> Operand:
    """Results in rows or blocks, each with a scale that follows from values not known exactly."""
    largest = a.largest()
    block = 128 if granularity == "blocks" else max(largest.shape[1], 1)
    amax = _of_block(largest, block, lambda part: part.amax(1, keepdim=True))
    scale = torch.where(amax == 0, 1.0, (amax / FP8_MAX[dtype]).clamp(min=2.0**-128))
    relative, absolute = _STEP[dtype]
    step = torch.maximum(relative * (1 + 2.0**-10) * largest, absolute * scale)
    is_known = _of_block(a.value.isfinite(), block, lambda part: part.all(1, keepdim=True))
    value = torch.where(is_known, a.value, math.nan)
    made = approx(value, a.error + torch.where(amax == 0, 0.0, step))
    of_row = scale.amax(1, keepdim=True) if scale.numel() else scale.new_ones(scale.shape[0], 1)
    return Operand(made.value, made.error, of_row, FP8_MAX[dtype])


def quantized(
    a: Approx,
    granularity: str,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = False,
    scale: Tensor | None = None,
) -> Operand:
    """a [rows, K]. granularity: "tensor", "rows", "blocks" (1 x 128) or "squares" (128 x 128).
    Results, which have an error, by rows or blocks only."""
    if a.is_exact():
        return _exactly(a.value.float(), granularity, dtype, power_of_two, scale)
    assert granularity in ("rows", "blocks")
    assert not power_of_two
    return _nearly(a, dtype, granularity)


def delayed(x: Tensor, factor: float, dtype: torch.dtype, power_of_two: bool) -> Operand:
    """x [rows, K] cast with one scale between that of its own amax and `factor` times as much: so
    nothing saturates, and half a step of subnormal numbers grows by the factor at most. Elements
    that are not finite become NaN and count in no scale."""
    value = x.detach().cpu().double()
    finite = value.isfinite()
    amax = torch.cat([value.abs()[finite], value.new_zeros(1)]).max()
    # Of all zeros the scale is whatever it was before: 0 is 0 with any.
    scale = (amax / FP8_MAX[dtype] * factor * (2 if power_of_two else 1)).clamp(min=2.0**-128)
    relative, absolute = _STEP[dtype]
    error = torch.maximum(relative * (1 + 2.0**-10) * value.abs(), absolute * scale)
    error = torch.where(value == 0, 0.0, error)
    made = approx(torch.where(finite, value, math.nan), error)
    return Operand(made.value, made.error, scale.expand(x.shape[0], 1), FP8_MAX[dtype])


# --- products ---


def product(a: Operand, b: Operand, way: Accumulation) -> Approx:
    """a [M, K] · b [N, K]ᵀ before it is rounded to its dtype."""
    k = a.value.shape[1]
    value = a.value @ b.value.t()
    large_a, large_b = a.value.abs() + a.error, b.value.abs() + b.error
    magnitude = large_a @ large_b.t()
    error = a.value.abs() @ b.error.t() + a.error @ large_b.t()
    error = error + bounds.relative_error(k, way) * magnitude
    smallest = 2.0**-149 if way == "fp32" else 2.0**-126
    scales = a.scale * b.scale.t()
    codes = k * a.largest_code * b.largest_code
    error = error + (k > 0) * smallest * (codes + a.scale + b.scale.t())
    # Codes times one scale must be in range as well, the scales' product, and the operands, which
    # rounding may have made larger.
    smaller = torch.minimum(a.scale, b.scale.t()).clamp(max=1.0)
    beyond = torch.maximum(magnitude / smaller, scales) > 0.99 * _FLT_MAX
    for large in (large_a.sum(1, keepdim=True), large_b.sum(1)):
        beyond = beyond | (large > 0.99 * _FLT_MAX)
    return approx(value, torch.where(beyond & (k > 0), math.inf, error))


def high_precision(
    a: Approx, b: Approx, relative: float = 0.0, parts_in: torch.dtype | None = None
) -> Approx:
    """aᵀ · b of [T, M] and [T, N], summed in fp32 by torch's own products, which may take subnormal
    numbers for zero. relative: what they lose beyond that, relative to the sum of magnitudes.
    parts_in: where they may store parts of a sum, whose range those must not leave then."""
    value = a.value.t() @ b.value
    large_a, large_b = a.largest(), b.largest()
    magnitude = large_a.t() @ large_b
    error = a.value.abs().t() @ b.error + a.error.t() @ large_b
    relative += (a.value.shape[0] + 2) * _U
    largest = _FLT_MAX
    if parts_in is not None:
        relative += 4 * bounds._ROUNDING[parts_in][0]
        largest = torch.finfo(parts_in).max
    beyond = magnitude > 0.99 * largest
    flushed = 2.0**-126 * (1 + large_a.sum(0)[:, None] + large_b.sum(0))
    error = error + relative * magnitude + flushed
    return approx(value, torch.where(beyond, math.inf, error))


# --- the check ---


def check(actual: Tensor, expected: Approx, what: str) -> None:
    """Raises AssertionError "{what}: ..." where an element lies beyond its error."""
    value = expected.value
    if actual.shape != value.shape:
        raise AssertionError(f"{what} shape: {list(actual.shape)}, expected {list(value.shape)}")
    got = actual.detach().cpu().double()
    bad = ~((got - value).abs() <= expected.error)  # NaN is bad
    bad = torch.where(value.isfinite(), bad, got.isfinite()) & ~expected.error.isposinf()
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        numbers = (t[first].item() for t in (got, value, expected.error))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are wrong, first at "
            "{}: got {:.9g}, expected {:.9g} within {:.3g}".format(list(first), *numbers)
        )
