"""The norms, bit for bit against their formulas in plain torch operations, values and gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from case_fields import Case, Choice, Extent, Family, Lead, Seed
from case_tensors import DTYPES, KINDS, LAYOUTS, tensor
from reference import assert_same_bits

import fp8  # noqa: F401  (registers the operators)

sys.path.append(str(Path(__file__).resolve().parents[1] / "python/norm"))
import norm_reference

OPS = torch.ops.fp8
_FINITE = 1e30  # sums of larger gradients may overflow in one order and not in another


def _run(case: Case, leaves: list, residual, total: bool):
    if case["form"] == norm_reference.LAYER:
        return OPS.layer_norm(*leaves, eps=case["eps"]), None
    options = (leaves[1] if len(leaves) > 1 else None, case["eps"], case["form"])
    if total:
        return OPS.add_rms_norm(leaves[0], residual, *options)
    return OPS.rms_norm(leaves[0], *options), None


def check_norm(case: Case, device: str) -> None:
    dtype, form = DTYPES[case["dtype"]], case["form"]
    shape, layer = (*case["lead"], case["k"]), form == norm_reference.LAYER

    def made(kind: str, layout: str, size: tuple[int, ...], place: int):
        return tensor(kind, layout, size, dtype, case["data"] + place, device).detach()

    x = made(case["kind"], case["layout"], shape, 0).requires_grad_()
    total = case["residual"] and not layer
    residual = made("normal", case["other_layout"], shape, 1) if total else None
    leaves = [x]
    if case["weight"]:
        leaves.append(made("normal", "contiguous", shape[-1:], 2).requires_grad_())
    if case["weight"] and layer:
        leaves.append(made("normal", "contiguous", shape[-1:], 3).requires_grad_())
    y, summed = _run(case, leaves, residual, total)
    dy = made("normal", case["other_layout"], shape, 4)
    grads = torch.autograd.grad(y, leaves, dy)

    def rows(t):  # on the CPU, where torch divides as IEEE has it
        t = t.detach().cpu()
        return t.reshape(-1, case["k"]) if t.numel() else t.new_empty(0, 1)

    normed = x if summed is None else summed
    if summed is not None:
        assert_same_bits(summed, x + residual, "norm sum")
    weight, bias = [*(t.detach().cpu() for t in leaves[1:]), None, None][:2]
    if not y.numel():
        assert not any(bool(g.any()) for g in grads), "norm gradient: not zero"
        return
    saved = norm_reference.forward(rows(normed), weight, case["eps"], form, bias)
    assert_same_bits(rows(y), saved.y, "norm y")
    expected = norm_reference.backward(rows(dy), rows(normed), saved, weight, form)
    assert_same_bits(rows(grads[0]), expected.dx, "norm dx")
    for grad, terms in zip(grads[1:], (expected.weight_terms, expected.dy), strict=False):
        if bool((terms.abs() < _FINITE).all()):
            norm_reference.assert_sum_over_rows(grad.cpu(), terms, "norm dweight: beyond the bound")


NORM = Family(
    "norm",
    {
        "form": Choice(*norm_reference.FORMS, norm_reference.LAYER),
        "lead": Lead(300),
        "k": Extent(0, 2000),
        "dtype": Choice(*DTYPES),
        "kind": Choice(*KINDS),
        "layout": Choice(*LAYOUTS, plain=0.3),
        "other_layout": Choice(*LAYOUTS, plain=0.5),
        "weight": Choice(True, False, plain=0.6),
        "residual": Choice(False, True, plain=0.5),
        "eps": Choice(1e-6, 1e-5, 1e-2),
        "data": Seed(),
    },
    check_norm,
)
