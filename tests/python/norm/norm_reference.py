"""Norms in plain torch operations, in three ways.

`eager` is what models write; autograd differentiates it. `forward` and `backward` are the same
formulas one operation after the other, in fp32, with sums over a row in the order that
csrc/host/norm.h describes: they have the operators' bits. `exact` is fp64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from samples_norm import NORM_FORMS
from torch import Tensor
from torch.nn import functional as F

FORMS = NORM_FORMS
LAYER = "layer"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
U = 2.0**-24
_HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_HALF_SMALLEST = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150}
MAX_THREADS, WARP = 512, 32


def eager(
    x: Tensor, weight: Tensor | None, eps: float, form: str, bias: Tensor | None = None
) -> Tensor:
    """As transformers' modules and torch's write it."""
    if form == LAYER:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    hat = x.float()
    hat = hat * torch.rsqrt(hat.pow(2).mean(-1, keepdim=True) + eps)
    if form == "scale_then_round":
        return (hat if weight is None else weight * hat).to(x.dtype)
    if form == "round_then_scale":
        return hat.to(x.dtype) if weight is None else weight * hat.to(x.dtype)
    return (hat if weight is None else hat * (1.0 + weight.float())).to(x.dtype)


def row_sum(terms: Tensor, vectors: int = 4, threads: int = 1) -> Tensor:
    """Sums over the rows of fp32 terms [M, K], in the kernels' order. [M, 1]. threads: at least."""
    rows, cols = terms.shape
    eights = math.ceil(cols / 8)
    while threads < MAX_THREADS and eights > threads * vectors:
        threads *= 2
    rounds = math.ceil(eights / threads)
    padded = torch.zeros(rows, rounds * threads * 8, dtype=torch.float32, device=terms.device)
    padded[:, :cols] = terms
    parts = padded.view(rows, rounds, threads, 8)
    for _ in range(3):  # pairs of an eight
        parts = parts[..., ::2] + parts[..., 1::2]
    parts = parts[..., 0]
    total = torch.zeros(rows, threads, dtype=torch.float32, device=terms.device)
    for i in range(rounds):
        total = total + parts[:, i]
    warps = total.view(rows, -1, min(threads, 32))
    while warps.shape[-1] > 1:
        half = warps.shape[-1] // 2
        warps = warps[..., :half] + warps[..., half:]
    result = warps[:, 0]
    for w in range(1, warps.shape[1]):
        result = result + warps[:, w]
    return result


class Saved(NamedTuple):
    y: Tensor
    mean: Tensor | None  # [M, 1]
    rstd: Tensor  # [M, 1]


def _factor(weight: Tensor | None, form: str) -> Tensor | float:
    if weight is None:
        return 1.0
    return 1.0 + weight.float() if form == "scale_by_one_plus" else weight.float()


def forward(
    x: Tensor, weight: Tensor | None, eps: float, form: str, bias: Tensor | None = None
) -> Saved:
    """x [M, K]. The weight is not wider than x where the form is round_then_scale."""
    wide, cols = x.float(), x.shape[1]
    mean = row_sum(wide) / cols if form == LAYER else None
    centered = wide if mean is None else wide - mean
    eps32 = torch.tensor(eps, dtype=torch.float32, device=x.device)
    variance = row_sum(centered * centered) / cols + eps32
    # IEEE's, by way of fp64: torch's own on the CPU may be one step off.
    rstd = (1.0 / variance.double().sqrt().float().double()).float()
    hat = centered * rstd
    if form == "round_then_scale":
        hat = hat.to(x.dtype).float()
    y = hat * _factor(weight, form)
    if bias is not None:
        y = y + bias.float()
    return Saved(y.to(x.dtype), mean, rstd)


class Gradients(NamedTuple):
    dx: Tensor
    weight_terms: Tensor  # [M, K] fp32, to be summed over the rows
    dy: Tensor  # the bias's terms


def backward(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    weight: Tensor | None,
    form: str,
    add: Tensor | None = None,
) -> Gradients:
    """As autograd differentiates `eager`, operation by operation; LayerNorm as torch's kernel."""
    cols, rstd, wide = x.shape[1], saved.rstd, x.float()
    rounds = form == "round_then_scale"
    hat = (wide - saved.mean if form == LAYER else wide) * rstd
    g = dy.float() * _factor(weight, form)
    if rounds:
        g = g.to(x.dtype).float()
    vectors = 2 if form == LAYER or x.dtype == torch.float32 else 4
    if form == LAYER:
        product, total = row_sum(g * hat, vectors, WARP), row_sum(g, vectors, WARP)
        dx = (g * cols - hat * product - total) * (rstd / cols)
    else:
        product = row_sum(g * wide, vectors, WARP)
        c = -0.5 * product * (rstd * rstd * rstd) / cols
        dx = g * rstd + c * (2 * wide)
    dx = dx.to(x.dtype)
    if add is not None:
        dx = (add.float() + dx.float()).to(x.dtype)
    terms = dy.float() * (hat.to(x.dtype).float() if rounds else hat)
    return Gradients(dx, terms.to(x.dtype).float() if rounds else terms, dy.float())


def assert_sum_over_rows(actual: Tensor, terms: Tensor, what: str) -> None:
    """A gradient [K] against the fp64 sum of its fp32 terms [M, K]: M - 1 additions in fp32 in
    any order, and the rounding to its dtype."""
    exact, size = terms.double().sum(0), terms.double().abs().sum(0)
    error = max(len(terms), 1) * U * size
    bound = error + _HALF_ULP[actual.dtype] * (exact.abs() + error) + _HALF_SMALLEST[actual.dtype]
    assert bool(((actual.double() - exact).abs() <= bound).all()), what


def exact(
    x: Tensor, weight: Tensor | None, eps: float, form: str, bias: Tensor | None = None
) -> Tensor:
    """In fp64, not rounded."""
    wide = x.double()
    if form == LAYER:
        wide = wide - wide.mean(-1, keepdim=True)
    hat = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)
    if weight is not None:
        hat = hat * (weight.double() + (form == "scale_by_one_plus"))
    return hat if bias is None else hat + bias.double()


def values_bound(
    x: Tensor, exact_y: Tensor, form: str, bias: Tensor | None, size: Tensor, weight: Tensor
) -> Tensor:
    """Of |y - exact_y|, `size` being |weight · xhat|.

    A sum of K squares has a relative error of K·u, of which a square root halves; mean, eps, root,
    division, product with rstd and with the weight: 8 roundings more, LayerNorm's centering with
    an error of K·u·mean|x| in the mean of K: relative to a row's largest |xhat|. Then y's own
    rounding, and that of T(xhat).
    """
    cols = x.shape[-1]
    relative = (cols + 16) * U
    error = relative * size
    if form == LAYER:
        wide = x.double()
        spread = wide.std(-1, correction=0, keepdim=True).clamp_min(1e-30)
        error = error + relative * (wide.abs().amax(-1, keepdim=True) / spread) * size.amax()
    half = _HALF_ULP[x.dtype]
    if form == "round_then_scale":
        error = error + half * size * (1 + relative)
    extra = 0.0 if bias is None else 2 * U * (size + bias.double().abs())
    smallest = _HALF_SMALLEST[x.dtype] * (1 + weight.double().abs())
    return error + extra + half * (exact_y.abs() + error) + smallest
