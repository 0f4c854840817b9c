"""fused_linear and fp8.Linear, forward and backward, in every recipe of dynamic or static scales.

The reference quantizes to the bit and multiplies in fp64.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import bounds
import error_bounds
import torch
from case_fields import Case, Choice, Extent, Family, Lead, Seed
from case_tensors import DENSE, DTYPES, KINDS, LAYOUTS, tensor
from error_bounds import Approx, exact, product, quantized, rounded
from fuzz_matmul import with_bias
from fuzz_quantize import MODES, mode
from reference import E4M3, as_matrix, assert_same_bits
from torch import Tensor

import fp8
from fp8.recipe import check_recipe

OPS = torch.ops.fp8
RECIPES = tuple(n for n, recipe in fp8.RECIPES.items() if recipe.scaling == "dynamic")
# How x, the weight, and dy are scaled.
_GRANULARITY = {
    "tensorwise": ("tensor", "tensor", "tensor"),
    "rowwise": ("rows", "rows", "rows"),
    "blockwise": ("blocks", "squares", "blocks"),
}


class Problem(NamedTuple):
    """What was computed with: matrices as the operator casts them, on the CPU."""

    x: Approx  # [M, K]
    weight: Approx  # [N, K]
    bias: Tensor | None
    dy: Approx  # [M, N]
    dtype: torch.dtype
    recipe: str  # with its option
    scale: Tensor | None  # input_scale
    device: str


def forward(p: Problem) -> Approx:
    recipe = check_recipe(p.recipe)
    of_x, of_weight, _ = _GRANULARITY[recipe.granularity]
    two = recipe.power_of_two
    x = quantized(p.x, of_x, E4M3, two and p.scale is None, p.scale)
    weight = quantized(p.weight, of_weight, E4M3, two)
    way = bounds.accumulation_of(p.device, "fprop" in recipe.fast_accum)
    return with_bias(rounded(product(x, weight, way), p.dtype), p.bias, p.dtype)


def input_gradient(p: Problem) -> Approx:
    recipe = check_recipe(p.recipe)
    _, of_weight, of_dy = _GRANULARITY[recipe.granularity]
    two = recipe.power_of_two
    dy = quantized(p.dy, of_dy, recipe.grad_output_dtype, two)
    weight = quantized(p.weight.t(), of_weight, E4M3, two)
    way = bounds.accumulation_of(p.device, "dgrad" in recipe.fast_accum)
    return rounded(product(dy, weight, way), p.dtype)


def weight_gradient(p: Problem) -> Approx:
    """Before it is rounded."""
    recipe = check_recipe(p.recipe)
    if recipe.wgrad == "high precision":
        # A GPU may add a product's parts up in 16 bits (torch allows cuBLAS to).
        parts_in = None if p.device == "cpu" else p.dtype
        return error_bounds.high_precision(p.dy, p.x, parts_in=parts_in)
    of_x, _, of_dy = _GRANULARITY[recipe.granularity]
    two = recipe.power_of_two
    dy = quantized(p.dy.t(), of_dy, recipe.grad_output_dtype, two)
    x = quantized(p.x.t(), of_x, E4M3, two and p.scale is None, p.scale)
    return product(dy, x, bounds.accumulation_of(p.device, "wgrad" in recipe.fast_accum))


def bias_gradient(p: Problem) -> Approx:
    return rounded(error_bounds.total(p.dy), p.dtype)


# --- a case ---


class Call(NamedTuple):
    """The tensors of a case, and how it calls the operator."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    recipe: str
    module: fp8.Linear | None
    autocast: torch.dtype | None

    def __call__(self, x: Tensor) -> Tensor:
        cast = contextlib.nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(x.device.type, self.autocast)
        with cast:
            if self.module is not None:
                return self.module(x)
            return OPS.fused_linear(x, self.weight, self.bias, self.recipe, input_scale=self.scale)

    def problem(self, x: Tensor, dy: Tensor) -> Problem:
        dtype = self.autocast or x.dtype

        def cast(t: Tensor) -> Tensor:
            return t.detach().cpu().to(dtype)

        bias = None if self.bias is None else cast(self.bias)
        scale = None if self.scale is None else self.scale.detach().cpu()
        matrices = [exact(as_matrix(t)) for t in (cast(x), cast(dy))]
        return Problem(
            matrices[0],
            exact(cast(self.weight)),
            bias,
            matrices[1],
            dtype,
            self.recipe,
            scale,
            x.device.type,
        )


def _tensors(case: Case, device: str) -> Call:
    dtype, k, n = DTYPES[case["dtype"]], case["k"], case["n"]
    shapes = {"x": (*case["lead"], k), "w": (n, k), "b": (n,)}
    made = {}
    for i, (name, shape) in enumerate(shapes.items()):
        kind, layout = case[f"{name}_kind"], case[f"{name}_layout"]
        made[name] = tensor(kind, layout, shape, dtype, case["data"] + i, device)
        made[name].requires_grad_(name in case["wants"])
    bias = made["b"] if case["bias"] else None
    recipe = case["recipe"] + case["option"]
    scale = None
    if case["recipe"] == "tensorwise" and case["scale"] is not None:
        scale = torch.tensor(case["scale"], device=device)
    module = None
    weight = made["w"]
    if case["form"] != "op":
        module = fp8.Linear(k, n, bias is not None, device, dtype, recipe=recipe)
        weight = module.weight = torch.nn.Parameter(weight.detach(), "w" in case["wants"])
        if bias is not None:
            bias = module.bias = torch.nn.Parameter(bias.detach(), "b" in case["wants"])
        module.input_scale = scale
    autocast = case["autocast"] and DTYPES[case["autocast"]]
    return Call(made["x"], weight, bias, scale, recipe, module, autocast)


def _gradients(case: Case, y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Of all leaves, in the way that the case asks for one."""
    if case["backward"] == "backward":
        y.backward(dy)
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found
    if case["backward"] == "one by one":
        return [torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for leaf in leaves]
    if case["backward"] == "retained":
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        second = torch.autograd.grad(y, leaves, dy)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(b, a, "fused_linear retain_graph")
        return list(second)
    return list(torch.autograd.grad(y, leaves, dy))


def _check_gradients(case: Case, call: Call, x: Tensor, y: Tensor, dy: Tensor) -> None:
    p = call.problem(x, dy)
    weight = call.weight
    main = None
    if case["form"] == "main_grad" and weight.requires_grad:
        main = weight.main_grad
    before = None if main is None else exact(main)
    leaves = {"x": call.x, "w": weight if main is None else None, "b": call.bias}
    if case["x_is"] == "written":
        leaves["x"] = None
    leaves = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    if not leaves and main is None:
        return
    if main is not None:
        y.backward(dy)
        found = [leaf.grad for leaf in leaves.values()]
        assert weight.grad is None, "fused_linear main_grad: the weight has a gradient too"
    else:
        found = _gradients(case, y, list(leaves.values()), dy)
    for name, grad in zip(leaves, found, strict=True):
        leaf, what = leaves[name], f"fused_linear d{name}, {call.recipe}"
        make = {"x": input_gradient, "w": weight_gradient, "b": bias_gradient}[name]
        expected = rounded(make(p), p.dtype)
        if leaf.dtype != p.dtype:  # autocast's cast is undone
            expected = rounded(expected, leaf.dtype)
        assert grad.dtype == leaf.dtype, f"{what} dtype: {grad.dtype}"
        error_bounds.check(grad.reshape(expected.value.shape), expected, what)
    if main is not None:
        expected = weight_gradient(p)
        if case["main"] != "overwrite":
            expected = error_bounds.plus(expected, before)
        if main.dtype != torch.float32:  # a product that is stored first is rounded once more
            expected = rounded(expected, torch.float32)
        what = f"fused_linear main_grad, {call.recipe}"
        error_bounds.check(main, rounded(expected, main.dtype), what)


def _main_grad(case: Case, weight: Tensor, device: str) -> None:
    if case["form"] != "main_grad":
        return
    dtype = DTYPES[case["main_dtype"]]
    shape = tuple(weight.shape)
    weight.main_grad = tensor("normal", case["main_layout"], shape, dtype, case["data"], device)
    weight.overwrite_main_grad = case["main"] == "overwrite"


def check_linear(case: Case, device: str) -> None:
    with mode(case["mode"]):
        call = _tensors(case, device)
        _main_grad(case, call.weight, device)
        cached = contextlib.nullcontext()
        if call.module is not None and case["cached"]:
            cached = fp8.cached_weights(call.module)
        with cached:
            x = call.x if case["x_is"] == "leaf" else call.x * 1
            y = call(x)
            for _ in range(case["repeats"]):
                assert_same_bits(call(x), y, "fused_linear repeated")
            if case["x_is"] == "written":  # noticed, although x was quantized before
                x.mul_(-2)
                y = call(x)
            if case["cached"] == "updated":
                with torch.no_grad():
                    call.weight.copy_(call.weight.detach().clone().mul_(-2))
                y = call(x)
            dy = tensor(
                case["dy_kind"], case["dy_layout"], tuple(y.shape), y.dtype, case["data"], device
            )
            p = call.problem(x, dy)
            assert y.dtype == p.dtype, f"fused_linear y dtype: {y.dtype}, expected {p.dtype}"
            what = f"fused_linear y, {call.recipe}"
            error_bounds.check(as_matrix(y.detach()), forward(p), what)
            if y.requires_grad:
                _check_gradients(case, call, x, y, dy)


LINEAR = Family(
    "linear",
    {
        "recipe": Choice(*RECIPES),
        "option": Choice("", ":power_of_two"),
        "lead": Lead(300),
        "k": Extent(0, 300),
        "n": Extent(0, 300),
        "dtype": Choice(*DTYPES),
        "bias": Choice(False, True),
        "x_kind": Choice(*KINDS, plain=0.2),
        "w_kind": Choice(*KINDS, plain=0.2),
        "b_kind": Choice(*KINDS, plain=0.2),
        "dy_kind": Choice(*KINDS, plain=0.2),
        "x_layout": Choice(*LAYOUTS, plain=0.3),
        "w_layout": Choice(*DENSE, plain=0.3),
        "b_layout": Choice(*LAYOUTS, plain=0.3),
        "dy_layout": Choice(*LAYOUTS, plain=0.3),
        "wants": Choice("", "x", "w", "b", "xw", "xb", "wb", "xwb"),
        "scale": Choice(None, 1.0, 0.01, 1e-38, 3e35, plain=0.7),
        "form": Choice("op", "module", "main_grad"),
        "main": Choice("add", "overwrite"),
        "main_dtype": Choice(*DTYPES),
        "main_layout": Choice(*DENSE),
        "cached": Choice(False, True, "updated"),
        "x_is": Choice("leaf", "result", "written", plain=0.5),
        "repeats": Choice(0, 1, 2),
        "autocast": Choice(None, "bfloat16", "float16", plain=0.6),
        "backward": Choice("grad", "backward", "retained", "one by one"),
        "mode": Choice(*MODES, plain=0.7),
        "data": Seed(),
    },
    check_linear,
    share=4,
)
