"""fused_linear written out with the public operators: what each recipe promises, step by step.

The same operators on the same operands give the same bits, so fused_linear is compared with this
bit for bit, except where a plain sum is involved (bias gradient, wgrad in high precision).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from reference import E4M3, as_matrix, assert_same_bits
from torch import Tensor

import fp8
from fp8.recipe import OPTIONS, check_recipe

OPS = torch.ops.fp8
RECIPES = tuple(fp8.RECIPES)  # what each stands for is written out in module/test_recipe.py
# `delayed` scales its first 16 calls dynamically: test_linear_delayed.py has those after them.
ONE_SCALE = tuple(n for n, recipe in fp8.RECIPES.items() if recipe.granularity == "tensorwise")
WITH_OPTIONS = RECIPES + tuple(f"{recipe}:{option}" for recipe in RECIPES for option in OPTIONS)


class Result(NamedTuple):
    y: Tensor
    dx: Tensor
    dw: Tensor
    db: Tensor


def _operands(
    x: Tensor,
    recipe: str,
    dtype: torch.dtype = E4M3,
    weight: bool = False,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, data_t and the scale of each."""
    granularity = check_recipe(recipe).granularity
    if granularity == "tensorwise":
        data, data_t, scale = OPS.quantize_tensorwise_transpose(x, dtype, power_of_two=power_of_two)
        return data, data_t, scale, scale
    if granularity == "blockwise":
        blocks = "128x128" if weight else "1x128"
        quantize = getattr(OPS, f"quantize_blockwise_{blocks}_transpose")
        return tuple(quantize(x, dtype, power_of_two=power_of_two))
    return tuple(OPS.quantize_rowwise_transpose(x, dtype, power_of_two=power_of_two))


def grad_dtype(recipe: str) -> torch.dtype:
    return check_recipe(recipe).grad_output_dtype


def high_precision_wgrad(recipe: str) -> bool:
    return check_recipe(recipe).wgrad == "high precision"


def accumulates_fast(recipe: str, product: str) -> bool:
    """Of fprop, dgrad, wgrad: on a GPU. The CPU adds in fp32 whatever the recipe says."""
    return product in check_recipe(recipe).fast_accum


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, recipe: str) -> Result:
    """Forward and backward with the output gradient dy. dw in high precision and db in fp64."""
    power_of_two = check_recipe(recipe).power_of_two
    fast = partial(accumulates_fast, recipe)
    x2, dy2 = as_matrix(x), as_matrix(dy)
    qx, qx_t, sx, sx_t = _operands(x2, recipe, power_of_two=power_of_two)
    qw, qw_t, sw, sw_t = _operands(weight, recipe, weight=True, power_of_two=power_of_two)
    qdy, qdy_t, sdy, sdy_t = _operands(dy2, recipe, grad_dtype(recipe), power_of_two=power_of_two)
    y = OPS.scaled_mm(qx, qw, sx, sw, bias, x.dtype, fast("fprop"))
    dx = OPS.scaled_mm(qdy, qw_t, sdy, sw_t, None, x.dtype, fast("dgrad"))
    if high_precision_wgrad(recipe):
        dw = dy2.double().t() @ x2.double()
    else:
        dw = OPS.scaled_mm(qdy_t, qx_t, sdy_t, sx_t, None, weight.dtype, fast("wgrad"))
    db = dy2.double().sum(0)
    return Result(y.reshape(*x.shape[:-1], -1), dx.reshape(x.shape), dw, db)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, recipe: str) -> Result:
    """The fused operator on detached copies, with all gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    y = OPS.fused_linear(x, weight, bias, recipe)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    dx, dw, *db = torch.autograd.grad(y, inputs, dy)
    return Result(y.detach(), dx, dw, db[0] if db else None)


def assert_matches(actual: Result, expected: Result, x: Tensor, dy: Tensor, recipe: str) -> None:
    if recipe.startswith("blockwise") and dy.shape[-1] == 1:
        # scaled_mm takes a scale [1, 1] of b for rowwise, and then fuses the bias: rounded once.
        torch.testing.assert_close(actual.y, expected.y, rtol=2**-7, atol=2**-7)
    else:
        assert_same_bits(actual.y, expected.y, "y")
    assert_same_bits(actual.dx, expected.dx, "dx")
    dy2 = as_matrix(dy).double()
    if high_precision_wgrad(recipe):
        magnitude = dy2.abs().t() @ as_matrix(x).double().abs()
        assert_sum(actual.dw, expected.dw, magnitude, dy2.shape[0], "dw")
    else:
        assert_same_bits(actual.dw, expected.dw, "dw")
    if actual.db is not None:
        assert_sum(actual.db, expected.db, dy2.abs().sum(0), dy2.shape[0], "db")


def assert_sum(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int, what: str) -> None:
    """A sum in fp32 in any order, rounded to its dtype: |err| ≤ terms·2^-24·Σ|·| + half an ulp.
    Products of bf16 or fp16 are exact in fp32; those of fp32 are rounded once more."""
    half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
    accumulation = (terms + 1) * 2.0**-24 * magnitude
    allowed = accumulation + half_ulp[actual.dtype] * (exact.abs() + accumulation) + 2.0**-25
    error = (actual.double() - exact).abs()
    assert bool((error <= allowed).all()), f"{what}: {(error / allowed).max().item()} of the bound"
