"""merged_linear, bit for bit against fused_linear on weights that were copied together, forward and
backward, with parts that are not used or frozen."""

from __future__ import annotations

import torch
from case_fields import Case, Choice, Extent, Family, Lead, Listed, Seed
from case_tensors import DENSE, DTYPES, KINDS, LAYOUTS, tensor
from reference import assert_same_bits
from torch import Tensor

import fp8
from fp8.recipe import check_recipe

OPS = torch.ops.fp8
RECIPES = tuple(n for n, recipe in fp8.RECIPES.items() if recipe.scaling == "dynamic")


def _leaf(t: Tensor | None, frozen: bool = False) -> Tensor | None:
    return None if t is None else t.detach().requires_grad_(not frozen)


def _same(ours: Tensor | None, theirs: Tensor, what: str) -> None:
    assert ours is not None, f"merged {what}: none"
    assert_same_bits(ours.detach().contiguous(), theirs.detach().contiguous(), f"merged {what}")


def _near(ours: Tensor | None, theirs: Tensor, what: str) -> None:
    """The same sums, in another order."""
    assert ours is not None, f"merged {what}: none"
    if not theirs.isfinite().all():  # beyond the range one order may get there, the other not
        return
    largest = theirs.abs().max().item() if theirs.numel() else 0.0
    rounding = torch.finfo(theirs.dtype).eps
    close = torch.allclose(ours, theirs, rtol=rounding, atol=1e-5 * largest)
    assert close, f"merged {what}: differs by more than an order of sums"


def check_merged(case: Case, device: str) -> None:
    dtype, recipe = DTYPES[case["dtype"]], case["recipe"]
    rows, k, lead = case["rows"], case["k"], case["lead"]
    places = iter(range(100))

    def made(kind: str, layout: str, *size: int) -> Tensor:
        return tensor(kind, layout, size, dtype, case["data"] + next(places), device).detach()

    x = made(case["kind"], case["layout"], *lead, k)
    kinds = [case["kind"], case["other_kind"]]
    weights = [made(kinds[i % 2], case["weight_layout"], n, k) for i, n in enumerate(rows)]
    biases = [
        made("normal", "contiguous", n) if case["biases"] >> i & 1 else None
        for i, n in enumerate(rows)
    ]
    dys = [made(kinds[(i + 1) % 2], case["layout"], *lead, n) for i, n in enumerate(rows)]
    used = [i for i in range(len(rows)) if not case["unused"] >> i & 1] or [0]
    frozen = {i for i in range(len(rows)) if case["frozen"] >> i & 1}

    leaf = _leaf(x)
    ours = [_leaf(w, i in frozen) for i, w in enumerate(weights)]
    own_biases = [_leaf(b) for b in biases]
    given = own_biases if any(b is not None for b in biases) else None
    ys = OPS.merged_linear(leaf, ours, given, recipe)
    torch.autograd.backward([ys[i] for i in used], [dys[i] for i in used])

    def joined(parts: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        whole = torch.cat([weights[i] for i in parts]).requires_grad_()
        bias = None
        if given is not None:
            zeros = [weights[i].new_zeros(rows[i]) for i in parts]
            own = [z if biases[i] is None else biases[i] for i, z in zip(parts, zeros, strict=True)]
            bias = torch.cat(own).requires_grad_()
        return OPS.fused_linear(inner, whole, bias, recipe), whole, bias

    inner = _leaf(x)
    y, _, _ = joined([*range(len(rows))])
    for i, (part, expected) in enumerate(zip(ys, y.split(rows, -1), strict=True)):
        _same(part, expected, f"y {i}")
    inner = _leaf(x)
    y, whole, bias = joined(used)
    y.backward(torch.cat([dys[i] for i in used], -1))
    one_scale = check_recipe(recipe).granularity == "tensorwise"
    if not one_scale or len(used) == len(rows):  # else the scale of all weights makes dx
        _same(leaf.grad, inner.grad, "dx")
    sizes = [rows[i] for i in used]
    for i, expected in zip(used, whole.grad.split(sizes), strict=True):
        if i in frozen:
            assert ours[i].grad is None, "merged dweight: of a frozen weight"
        elif check_recipe(recipe).wgrad == "fp8":
            # Rows of frozen weights are no part of the product, which may add in another order.
            compare = _near if frozen & {*used} else _same
            compare(ours[i].grad, expected, f"dweight {i}")
    if bias is not None:
        for i, expected in zip(used, bias.grad.split(sizes), strict=True):
            if biases[i] is not None:
                _same(own_biases[i].grad, expected, f"dbias {i}")
    for i in set(range(len(rows))) - set(used):
        assert ours[i].grad is None, "merged dweight: of a part that was not used"


MERGED = Family(
    "merged",
    {
        "recipe": Choice(*RECIPES, *(f"{r}:power_of_two" for r in RECIPES)),
        "lead": Lead(200),
        "k": Extent(1, 300),
        "rows": Listed(Extent(0, 200), 1, 6),
        "dtype": Choice(*DTYPES),
        "kind": Choice(*KINDS, plain=0.3),
        "other_kind": Choice(*KINDS, plain=0.3),
        "layout": Choice(*LAYOUTS, plain=0.4),
        "weight_layout": Choice(*DENSE, plain=0.5),
        "biases": Extent(0, 63),
        "unused": Choice(0, 1, 2, 3, 5, 6, plain=0.5),
        "frozen": Choice(0, 1, 2, 4, 5, 6, plain=0.5),
        "data": Seed(),
    },
    check_merged,
)
