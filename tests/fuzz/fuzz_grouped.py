"""grouped_linear and fp8.GroupedLinear: a loop over groups of fp64 products."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import NamedTuple

import bounds
import error_bounds
import torch
from case_fields import Case, Choice, Extent, Family, Listed, Seed
from case_tensors import DENSE, DTYPES, KINDS, LAYOUTS, tensor
from error_bounds import Approx, approx, exact, product, quantized, rounded
from fuzz_matmul import with_bias
from fuzz_quantize import MODES, mode
from reference import assert_same_bits
from torch import Tensor

import fp8
from fp8.recipe import check_recipe

OPS = torch.ops.fp8
RECIPES = fp8.GROUPED_RECIPES


class Ways(NamedTuple):
    """How products of a recipe are added up and rounded on a device."""

    fprop: bounds.Accumulation
    dgrad: bounds.Accumulation
    wgrad: bounds.Accumulation
    dtypes: tuple[torch.dtype, ...]  # that a product is rounded to, one after the other
    gpu: bool
    power_of_two: bool
    blocks: bool

    @classmethod
    def of(cls, recipe: str, dtype: torch.dtype, device: str) -> Ways:
        spec, gpu = check_recipe(recipe), device != "cpu"
        products = ("fprop", "dgrad", "wgrad")
        return cls(
            *(bounds.accumulation_of(device, name in spec.fast_accum) for name in products),
            (torch.bfloat16, dtype) if gpu and dtype != torch.bfloat16 else (dtype,),
            gpu,
            spec.power_of_two,
            spec.granularity == "blockwise",
        )

    def quantized(self, a: Approx, weight: bool = False) -> error_bounds.Operand:
        granularity = ("squares" if weight else "blocks") if self.blocks else "rows"
        return quantized(a, granularity, power_of_two=self.power_of_two)

    def stored(self, a: Approx) -> Approx:
        for dtype in self.dtypes:
            a = rounded(a, dtype)
        return a


def rows_by_weight(a: Approx, weight: Approx, ways: Ways, backward: bool = False) -> Approx:
    """a [T, K] · weight [N, K]ᵀ, both quantized, by rows or blocks."""
    way = ways.dgrad if backward else ways.fprop
    return ways.stored(product(ways.quantized(a), ways.quantized(weight, weight=True), way))


def columns(a: Approx, b: Approx, recipe: str, ways: Ways) -> Approx:
    """aᵀ · b of [T, M] and [T, N]: a weight gradient."""
    if a.value.shape[0] == 0:
        zeros = torch.zeros(a.value.shape[1], b.value.shape[1], dtype=torch.float64)
        return approx(zeros, zeros)
    if check_recipe(recipe).wgrad == "high precision" or ways.blocks:
        cast = 2.0**-7 if ways.gpu else 0.0  # of both operands to bf16
        return ways.stored(error_bounds.high_precision(a, b, cast))
    return ways.stored(product(ways.quantized(a.t()), ways.quantized(b.t()), ways.wgrad))


def joined(parts: list[Approx], like: tuple[int, ...]) -> Approx:
    """Of the groups' results, in order; of shape `like`."""
    zeros = torch.zeros(like, dtype=torch.float64)
    value, error = zeros.clone(), zeros.clone()
    begin = 0
    for part in parts:
        end = begin + part.value.shape[0]
        value[begin:end], error[begin:end] = part
        begin = end
    return approx(value, error)


def stacked(parts: list[Approx]) -> Approx:
    return Approx(torch.stack([p.value for p in parts]), torch.stack([p.error for p in parts]))


def _check_gradients(case: Case, y: Tensor, leaves: dict[str, Tensor], cast, ends, dy) -> None:
    recipe, dtype, device = case["recipe"] + case["option"], y.dtype, y.device.type
    ways = Ways.of(recipe, dtype, device)
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    if not wanted:
        return
    found = torch.autograd.grad(y, list(wanted.values()), dy, retain_graph=case["retain"])
    if case["retain"]:
        for a, b in zip(torch.autograd.grad(y, list(wanted.values()), dy), found, strict=True):
            assert_same_bits(a, b, "grouped_linear retain_graph")
    groups = [slice(a, b) for a, b in pairwise(ends)]
    x, weight, grad = exact(cast["x"]), exact(cast["w"]), exact(dy)
    make = {
        "x": lambda: joined(
            [
                rows_by_weight(grad.rows(s), weight.rows(g).t(), ways, backward=True)
                for g, s in enumerate(groups)
            ],
            tuple(x.value.shape),
        ),
        "w": lambda: stacked([columns(grad.rows(s), x.rows(s), recipe, ways) for s in groups]),
        "b": lambda: stacked([rounded(error_bounds.total(grad.rows(s)), dtype) for s in groups]),
    }
    for (name, leaf), actual in zip(wanted.items(), found, strict=True):
        expected = rounded(make[name](), leaf.dtype)
        assert actual.dtype == leaf.dtype, f"grouped_linear d{name} dtype: {actual.dtype}"
        error_bounds.check(actual, expected, f"grouped_linear d{name}, {recipe}")


def _tensors(case: Case, device: str) -> tuple[dict[str, Tensor | None], Tensor, list[int]]:
    dtype, k, n = DTYPES[case["dtype"]], case["k"], case["n"]
    ends = [0]
    for count in case["counts"]:
        ends.append(ends[-1] + count)
    groups, rows = len(case["counts"]), ends[-1] + case["spare"]
    shapes = {"x": (rows, k), "w": (groups, n, k), "b": (groups, n)}
    made = {}
    for i, (name, shape) in enumerate(shapes.items()):
        kind, layout = case[f"{name}_kind"], case[f"{name}_layout"]
        made[name] = tensor(kind, layout, shape, dtype, case["data"] + i, device)
        made[name].requires_grad_(name in case["wants"])
    if not case["bias"]:
        made["b"] = None
    offsets = torch.tensor(ends[1:], dtype=torch.int32, device=device)
    return made, offsets, ends


def check_grouped(case: Case, device: str) -> None:
    recipe = case["recipe"] + case["option"]
    with mode(case["mode"]):
        made, offsets, ends = _tensors(case, device)
        autocast = case["autocast"] and DTYPES[case["autocast"]]
        dtype = autocast or DTYPES[case["dtype"]]
        context = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
        cached = contextlib.nullcontext()

        def call() -> Tensor:
            return OPS.grouped_linear(made["x"], made["w"], offsets, made["b"], recipe)

        if case["form"] == "module":
            layer = fp8.GroupedLinear(
                len(case["counts"]), case["k"], case["n"], case["bias"], device, recipe=recipe
            )
            for name, attribute in (("w", "weight"), ("b", "bias")):
                if made[name] is not None:
                    made[name] = torch.nn.Parameter(made[name].detach(), name in case["wants"])
                    setattr(layer, attribute, made[name])
            cached = fp8.cached_weights(layer) if case["cached"] else cached

            def call() -> Tensor:
                return layer(made["x"], offsets)

        with cached, context:
            y = call()
            if case["cached"]:
                assert_same_bits(call(), y, "grouped_linear repeated")
        cast = {n: None if t is None else t.detach().cpu().to(dtype) for n, t in made.items()}
        x, weight = exact(cast["x"]), exact(cast["w"])
        ways = Ways.of(recipe, dtype, device)
        parts = []
        for g, (a, b) in enumerate(pairwise(ends)):
            part = rows_by_weight(x.rows(slice(a, b)), weight.rows(g), ways)
            parts.append(with_bias(part, cast["b"][g] if case["bias"] else None, dtype))
        what = f"grouped_linear y, {recipe}"
        assert y.dtype == dtype, f"{what} dtype: {y.dtype}"
        error_bounds.check(y.detach(), joined(parts, tuple(y.shape)), what)
        if y.requires_grad:
            kind, layout = case["dy_kind"], case["dy_layout"]
            dy = tensor(kind, layout, tuple(y.shape), dtype, case["data"], device)
            _check_gradients(case, y, made, cast, ends, dy)


GROUPED = Family(
    "grouped",
    {
        "recipe": Choice(*RECIPES),
        "option": Choice("", ":power_of_two"),
        "counts": Listed(Extent(0, 80), 1, 6),
        "spare": Choice(0, 1, 5, plain=0.7),
        "k": Extent(0, 200),
        "n": Extent(0, 200),
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
        "form": Choice("op", "module"),
        "cached": Choice(False, True),
        "retain": Choice(False, True),
        "autocast": Choice(None, "bfloat16", "float16", plain=0.6),
        "mode": Choice(*MODES, plain=0.7),
        "data": Seed(),
    },
    check_grouped,
    share=2,
)
