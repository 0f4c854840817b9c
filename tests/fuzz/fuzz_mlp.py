"""mlp, bit for bit against fused_linear and eager activations; with save="fp8" against save="bf16"
whose products were saved as what their codes stand for."""

from __future__ import annotations

from case_fields import Case, Choice, Extent, Family, Lead, Seed
from case_tensors import DENSE, DTYPES, KINDS, LAYOUTS, tensor
from mlp_reference import ACTIVATIONS, FORMS, NAMES, Problem, of_stored, run
from reference import assert_same_bits
from torch import Tensor

import fp8

RECIPES = tuple(n for n, recipe in fp8.RECIPES.items() if recipe.scaling == "dynamic")


def _problem(case: Case, device: str) -> Problem:
    dtype, form = DTYPES[case["dtype"]], case["form"]
    k, features, out = case["k"], case["features"], case["out"]
    places = iter(range(100))

    def made(kind: str, layout: str, *size: int) -> Tensor:
        return tensor(kind, layout, size, dtype, case["data"] + next(places), device).detach()

    wide = features * (2 if form in ("merged", "gate second") else 1)
    weight, separate = (case["weight_kind"], case["weight_layout"]), form == "separate"
    leaves = {
        "x": made(case["kind"], case["layout"], *case["lead"], k),
        "gate": made(*weight, wide, k),
        "up": made(*weight, features, k) if separate else None,
        "down": made(*weight, out, features),
    }
    sizes = (wide, features if separate else 0, out)
    for i, (name, size) in enumerate(zip(NAMES[4:], sizes, strict=True)):
        with_bias = case["biases"] >> i & 1 and size
        leaves[name] = made("normal", "contiguous", size) if with_bias else None
    dy = made(case["dy_kind"], case["layout"], *case["lead"], out)
    activation = case["activation"]
    if form == "plain" and activation == "clamped_silu":
        activation = "silu"  # which needs no gate
    return Problem(leaves, dy, form, {"recipe": case["recipe"], "activation": activation})


def check_mlp(case: Case, device: str) -> None:
    problem, save = _problem(case, device), case["save"]
    needed = {name for i, name in enumerate(NAMES) if not case["frozen"] >> i & 1}
    found = run(problem.fused, problem.fresh(needed), problem.dy, save=save)
    composed = run(problem.composed, problem.fresh(needed), problem.dy)
    assert_same_bits(found.y, composed.y, "mlp y")
    expected = of_stored(problem, needed) if save == "fp8" else composed
    for name, grad in expected.grads.items():
        assert (found.grads[name] is None) == (grad is None), f"mlp d{name}: there, or not"
        summed = name == "x" and problem.form == "separate" and save != "fp8"
        if grad is not None and not summed:  # dx of two weights is rounded once less
            assert_same_bits(found.grads[name], grad, f"mlp d{name}")


MLP = Family(
    "mlp",
    {
        "recipe": Choice(*RECIPES, *(f"{r}:power_of_two" for r in RECIPES)),
        "save": Choice("bf16", "fp8", "recompute"),
        "form": Choice(*FORMS),
        "activation": Choice(*ACTIVATIONS, "clamped_silu", plain=0.3),
        "lead": Lead(200),
        "k": Extent(1, 200),
        "features": Extent(1, 300),
        "out": Extent(1, 200),
        "dtype": Choice(*DTYPES),
        "kind": Choice(*KINDS, plain=0.3),
        "weight_kind": Choice("normal", *KINDS, plain=0.5),
        "dy_kind": Choice("normal", *KINDS, plain=0.3),
        "layout": Choice(*LAYOUTS, plain=0.4),
        "weight_layout": Choice(*DENSE, plain=0.5),
        "biases": Extent(0, 7),
        "frozen": Choice(0, 1, 2, 4, 8, 14, 127, plain=0.5),
        "data": Seed(),
    },
    check_mlp,
)
