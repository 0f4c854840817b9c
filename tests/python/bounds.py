"""Error bounds of scaled_mm, derived.

Products of two fp8 values have at most 8 significant bits and are exact in fp32. What is inexact:
adding them, multiplying by the two scales, adding the bias, and rounding to the output dtype. With
u = 2^-24 and S = Σ|a·b|·|scale_a·scale_b| + |bias|:

- fp32 accumulation in any order (CPU kernels, and the fallback): |err| ≤ (K + 8)·u·S. K - 1
  additions; the 8 covers operands scaled before the product, scales multiplied into the sum, and
  the bias.
- Hopper's tensor cores keep about 14 bits inside one accumulation: each step adds 32 products and
  the running sum, aligned to the largest exponent among them, and truncates each of the 33 terms
  below 2^-13 of it. A term loses less than t·S with t = 2^-13, a product never more than itself.
    fast:  K/32 steps on one running sum: |err| ≤ min(1, 32·t·K/32)·S + t·(K/32)·S.
    split: the running sum is promoted to fp32 every 128 elements, 4 steps; the partial sums' S add
           up to S: |err| ≤ 33·4·t·S + (K + 8)·u·S, whatever K. Block scales are multiplied into
           each of these partial sums: two roundings more, of the 8.

These are worst cases, which real kernels stay far below. `expected_rms` says how large the error is
on average: half a unit is lost a term. For data of one sign the losses add up and the running sum
grows linearly, so the mean loss is 33/2·t·S/2 a step; for random signs they add in squares:
variance 33/3·(t·|sum|)² a step, with sum² growing linearly.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from reference import decode, expand_scale
from torch import Tensor

Accumulation = Literal["fp32", "split", "fast"]

_U = 2.0**-24
_T = 2.0**-13
# Half an ulp, relative, and half the smallest subnormal.
_ROUNDING = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
}


class Product(NamedTuple):
    exact: Tensor  # [M, N] float64
    magnitude: Tensor  # [M, N] float64, S above
    k: int


def product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
) -> Product:
    """fp64 result of scaled_mm, on the device of a. addend: out before an accumulation."""
    left = decode(a) * expand_scale(scale_a, a.shape).double()
    right = (decode(b) * expand_scale(scale_b, b.shape).double()).t()
    exact, magnitude = left @ right, left.abs() @ right.abs()
    for term in (bias, addend):
        if term is not None:
            exact, magnitude = exact + term.double(), magnitude + term.double().abs()
    return Product(exact, magnitude, a.shape[-1])


def accumulation_of(device: str, fast_accum: bool) -> Accumulation:
    if device == "cpu":
        return "fp32"
    return "fast" if fast_accum else "split"


def relative_error(k: int, accumulation: Accumulation) -> float:
    """Of a sum of k products before it is rounded to its dtype, relative to S above."""
    steps = math.ceil(k / 32)
    relative = (k + 8) * _U
    if accumulation == "split":
        relative += 33 * 4 * _T
    elif accumulation == "fast":
        relative += min(1.0, 32 * _T * steps) + _T * steps
    return relative


def bound(result: Product, out_dtype: torch.dtype, accumulation: Accumulation) -> Tensor:
    """Largest |error| allowed for each output element."""
    error = relative_error(result.k, accumulation) * result.magnitude
    half_ulp, half_smallest = _ROUNDING[out_dtype]
    return error + half_ulp * (result.exact.abs() + error) + half_smallest


def assert_within(
    actual: Tensor, result: Product, accumulation: Accumulation, what: str = "scaled_mm"
) -> None:
    error = (actual.double() - result.exact).abs()
    allowed = bound(result, actual.dtype, accumulation)
    bad = ~(error <= allowed)  # NaN is bad
    if bool(bad.any()):
        worst = (error / allowed).nan_to_num(nan=math.inf).argmax()
        got, exact, limit = (t.flatten()[worst].item() for t in (actual, result.exact, allowed))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} beyond the {accumulation} bound; worst at "
            f"{divmod(int(worst), bad.shape[1])}: got {got}, exact {exact}, allowed error {limit}"
        )


def relative_rms(actual: Tensor, result: Product) -> float:
    """rms(error) / rms(exact)."""
    return float((actual.double() - result.exact).norm() / result.exact.norm())


def expected_rms(k: int, one_sign: bool, accumulation: Accumulation) -> float:
    """Model of relative_rms without output rounding (see the head of this file)."""
    if accumulation == "fp32":
        return k * _U
    steps = 4 if accumulation == "split" else math.ceil(k / 32)
    return 33 / 4 * _T * steps if one_sign else _T * math.sqrt(33 / 6 * steps)
