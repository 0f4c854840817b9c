"""grouped_linear written out: a loop over groups of fp64 products of dequantized operands, with the
bound of each product (../bounds.py); and a whole mixture of experts in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import bounds
import torch
from torch import Tensor

import fp8
from fp8.recipe import OPTIONS, check_recipe

OPS = torch.ops.fp8
RECIPES = fp8.GROUPED_RECIPES
WITH_OPTIONS = RECIPES + tuple(f"{recipe}:{option}" for recipe in RECIPES for option in OPTIONS)

ROUTINGS = {
    "random": (37, 5, 64, 21, 90),
    "skewed": (200, 1, 2, 1, 13),
    "empty groups": (0, 48, 0, 0, 33),
    "single group": (0, 0, 150, 0, 0),
    "multiples of 16": (32, 16, 64, 16, 128),
}


class Problem(NamedTuple):
    x: Tensor  # [T, K]
    weight: Tensor  # [E, N, K]
    offsets: Tensor  # [E]
    bias: Tensor  # [E, N]
    dy: Tensor  # [T, N]


def problem(counts, k, n, dtype=torch.bfloat16, device="cpu", spare=0, transposed=False) -> Problem:
    """Made on the CPU, so that every device sees the same values. `spare` rows lie behind."""
    rows, groups = sum(counts) + spare, len(counts)
    weight = (torch.randn(groups, n, k) / k**0.5).to(dtype).to(device)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    made = (
        torch.randn(rows, k).to(dtype).to(device),
        weight,
        torch.tensor(counts).cumsum(0).int().to(device),
        torch.randn(groups, n).to(dtype).to(device),
        torch.randn(rows, n).to(dtype).to(device),
    )
    return Problem(*made)


def slices(offsets: Tensor) -> list[slice]:
    ends = [0, *offsets.tolist()]
    return [slice(a, b) for a, b in pairwise(ends)]


class Result(NamedTuple):
    y: Tensor
    dx: Tensor
    dw: Tensor
    db: Tensor | None


def run(p: Problem, recipe: str, with_bias: bool = True) -> Result:
    """The operator on detached copies that keep their strides, with all gradients."""
    x, weight, bias = (t.detach().requires_grad_() for t in (p.x, p.weight, p.bias))
    y = OPS.grouped_linear(x, weight, p.offsets, bias if with_bias else None, recipe)
    leaves = [x, weight, bias] if with_bias else [x, weight]
    dx, dw, *db = torch.autograd.grad(y, leaves, p.dy)
    return Result(y.detach(), dx, dw, db[0] if db else None)


def product_dtype(p: Problem) -> torch.dtype:
    """What products in FP8 are rounded to: ATen's kernel writes bfloat16, whatever the dtype."""
    by_aten = p.x.is_cuda and torch.cuda.get_device_capability(p.x.device) != (9, 0)
    return torch.bfloat16 if by_aten else p.x.dtype


def quantizers(recipe: str) -> tuple[Callable, Callable]:
    """Of x and dy, and of a weight; each gives codes and scales."""
    spec = check_recipe(recipe)
    names = ("rowwise", "rowwise")
    if spec.granularity == "blockwise":
        names = ("blockwise_1x128", "blockwise_128x128")
    made = (getattr(OPS, f"quantize_{name}") for name in names)
    return tuple(partial(op, power_of_two=spec.power_of_two) for op in made)


def high_precision_wgrad(recipe: str) -> bool:
    """Also with blocks, which grouped products do not take along the rows of a group."""
    spec = check_recipe(recipe)
    return spec.wgrad == "high precision" or spec.granularity == "blockwise"


def check_values(p: Problem, actual: Result, recipe: str, with_bias: bool = True) -> None:
    """Every output against the fp64 loop over groups of the same dequantized operands."""
    spec = check_recipe(recipe)
    rows_of, of_weight = quantizers(recipe)
    ways = {
        name: bounds.accumulation_of(p.x.device.type, name in spec.fast_accum)
        for name in ("fprop", "dgrad", "wgrad")
    }
    for g, rows in enumerate(slices(p.offsets)):
        x, dy, weight = p.x[rows], p.dy[rows], p.weight[g]
        if x.shape[0] > 0:
            a, b = rows_of(x), of_weight(weight)
            exact = bounds.product(a[0], b[0], a[1], b[1])
            bias = p.bias[g] if with_bias else None
            _assert_product(actual.y[rows], exact, ways["fprop"], p, f"y of group {g}", bias)
            a, b = rows_of(dy), of_weight(weight.t().contiguous())
            exact = bounds.product(a[0], b[0], a[1], b[1])
            _assert_product(actual.dx[rows], exact, ways["dgrad"], p, f"dx of group {g}")
        if x.shape[0] == 0:
            assert not actual.dw[g].any(), f"dw of empty group {g}"
        elif high_precision_wgrad(recipe):
            _assert_high_precision(actual.dw[g], dy, x, p, f"dw of group {g}")
        else:
            a, b = rows_of(dy.t().contiguous()), rows_of(x.t().contiguous())
            exact = bounds.product(a[0], b[0], a[1], b[1])
            _assert_product(actual.dw[g], exact, ways["wgrad"], p, f"dw of group {g}")
        if with_bias:
            total = dy.double().sum(0)
            magnitude = dy.double().abs().sum(0)
            _assert_sum(actual.db[g], total, magnitude, dy.shape[0], f"db of group {g}")
    last = int(p.offsets[-1]) if p.offsets.numel() else 0
    assert not actual.y[last:].any()
    assert not actual.dx[last:].any()


def check_added(p: Problem, main_grad: Tensor, before: Tensor, recipe: str) -> None:
    """main_grad is before + dW, added in fp32 and rounded once; on a GPU a gradient in high
    precision is rounded to bf16 before."""
    spec = check_recipe(recipe)
    rows_of, _ = quantizers(recipe)
    way = bounds.accumulation_of(p.x.device.type, "wgrad" in spec.fast_accum)
    for g, rows in enumerate(slices(p.offsets)):
        x, dy, what = p.x[rows], p.dy[rows], f"main_grad of group {g}"
        if high_precision_wgrad(recipe):
            _assert_high_precision(main_grad[g], dy, x, p, what, before[g])
        elif x.shape[0] == 0:
            assert torch.equal(main_grad[g], before[g]), what
        else:
            a, b = rows_of(dy.t().contiguous()), rows_of(x.t().contiguous())
            exact = bounds.product(a[0], b[0], a[1], b[1], addend=before[g])
            bounds.assert_within(main_grad[g], exact, way, what)


def _assert_product(actual, exact, way, p, what, bias=None) -> None:
    """The bound of scaled_mm, then the bias added to the rounded product and rounded again."""
    allowed = bounds.bound(exact, product_dtype(p), way)
    value = exact.exact
    if bias is not None or product_dtype(p) != actual.dtype:
        value = value + (bias.double() if bias is not None else 0)
        half_ulp, smallest = bounds._ROUNDING[actual.dtype]
        allowed = allowed + half_ulp * (value.abs() + allowed) + smallest
    error = (actual.double() - value).abs()
    assert bool((error <= allowed).all()), f"{what}: {(error / allowed).max().item()} of the bound"


def _assert_high_precision(actual, dy, x, p, what, before=None) -> None:
    """dyᵀ x in fp32, operands in bf16 on a GPU; fp32 operands lose 2^-8 each there."""
    exact = dy.double().t() @ x.double()
    magnitude = dy.double().abs().t() @ x.double().abs()
    if before is not None:
        exact, magnitude = exact + before.double(), magnitude + before.double().abs()
    cast = 2.0**-7 if p.x.is_cuda and p.x.dtype != torch.bfloat16 else 0.0
    rounded = torch.bfloat16 if p.x.is_cuda else actual.dtype if before is not None else p.x.dtype
    half_ulp = max(bounds._ROUNDING[t][0] for t in (actual.dtype, rounded))
    error = (actual.double() - exact).abs()
    accumulation = ((dy.shape[0] + 2) * 2.0**-24 + cast) * magnitude
    # The gradient may be rounded before it is added, and larger than the sum.
    stored = exact.abs() if before is None else exact.abs() + before.double().abs()
    allowed = accumulation + 2 * half_ulp * (stored + accumulation) + 2.0**-30
    assert bool((error <= allowed).all()), f"{what}: {(error / allowed).max().item()} of the bound"


def _assert_sum(actual, exact, magnitude, terms, what) -> None:
    half_ulp = bounds._ROUNDING[actual.dtype][0]
    accumulation = (terms + 1) * 2.0**-24 * magnitude
    allowed = accumulation + half_ulp * (exact.abs() + accumulation) + 2.0**-25
    error = (actual.double() - exact).abs()
    assert bool((error <= allowed).all()), f"{what}: {(error / allowed).max().item()} of the bound"


# --- a mixture of experts ---


def gate(g: Tensor, activation: str, interleaved: bool, alpha=1.702, limit=7.0) -> Tensor:
    gates, ups = (g[:, ::2], g[:, 1::2]) if interleaved else g.chunk(2, -1)
    if activation == "clamped_silu":
        gates, ups = gates.clamp(max=limit), ups.clamp(-limit, limit)
        return gates * torch.sigmoid(alpha * gates) * (ups + 1)
    act = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    }[activation]
    return act(gates) * ups


def experts_fp64(tensors, activation, interleaved) -> Tensor:
    """x, index, weights, gate_up, down, gate_up_bias, down_bias, those that are floats in fp64."""
    x, index, weights, gate_up, down, gate_up_bias, down_bias = tensors
    y = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, choice = torch.where(index == e)
        g = x[token] @ gate_up[e].t()
        if gate_up_bias is not None:
            g = g + gate_up_bias[e]
        out = gate(g, activation, interleaved) @ down[e].t()
        if down_bias is not None:
            out = out + down_bias[e]
        y = y.index_add(0, token, out * weights[token, choice, None])
    return y
