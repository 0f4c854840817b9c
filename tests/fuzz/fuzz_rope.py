"""Rotary position embedding, bit for bit against its formulas in plain torch operations, values and
gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from case_fields import Case, Choice, Extent, Family, Seed
from case_tensors import DTYPES, KINDS, LAYOUTS, tensor
from reference import assert_same_bits

import fp8  # noqa: F401  (registers the operators)

sys.path.append(str(Path(__file__).resolve().parents[1] / "python/rope"))
import rope_reference

OPS = torch.ops.fp8


def check_rope(case: Case, device: str) -> None:
    dtype = DTYPES[case["dtype"]]
    angle_dtype = torch.float32 if case["wide_angles"] else dtype
    rotary = 2 * min(case["pairs"], case["size"] // 2)
    columns = rotary // 2 if case["per_pair"] else rotary
    batch, positions, size = case["batch"], case["positions"], case["size"]

    def made(kind: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, place: int):
        return tensor(kind, layout, shape, dtype, case["data"] + place, device).detach()

    q, k = (
        made(case["kind"], case[layout], (batch, heads, positions, size), dtype, place)
        for place, (layout, heads) in enumerate(
            (("layout", case["heads"]), ("other_layout", case["k_heads"]))
        )
    )
    shape = (1 if case["one_batch"] else batch, 1, positions, columns)
    cos, sin = (made("normal", case["angles"], shape, angle_dtype, place) for place in (2, 3))
    leaves = [x.requires_grad_() for x in (q, k)]
    theirs = [x.detach().requires_grad_() for x in (q, k)]
    form = (case["form"], case["rounding"])
    ours = OPS.rope(*leaves, cos, sin, layout=form[0], rotary_dim=rotary, rounding=form[1])
    expected = [rope_reference.eager(x, cos, sin, *form, rotary) for x in theirs]
    for name, a, b in zip("qk", ours, expected, strict=True):
        assert_same_bits(a, b, f"rope {name}")
    grads = [
        made("normal", case["grad_layout"], tuple(y.shape), y.dtype, 4 + i)
        for i, y in enumerate(expected)
    ]
    ours = torch.autograd.grad(ours, leaves, grads)
    for name, a, b in zip("qk", ours, torch.autograd.grad(expected, theirs, grads), strict=True):
        assert_same_bits(a, b, f"rope gradient of {name}")


ROPE = Family(
    "rope",
    {
        "form": Choice(*rope_reference.LAYOUTS),
        "rounding": Choice(*rope_reference.ROUNDINGS),
        "batch": Extent(0, 4),
        "heads": Extent(0, 24),
        "k_heads": Extent(0, 12),
        "positions": Extent(0, 150),
        "size": Extent(0, 300),
        "pairs": Extent(0, 150),
        "per_pair": Choice(False, True, plain=0.6),
        "one_batch": Choice(True, False),
        "dtype": Choice(*DTYPES),
        "wide_angles": Choice(False, True, plain=0.6),
        "kind": Choice(*KINDS),
        "layout": Choice(*LAYOUTS, plain=0.3),
        "other_layout": Choice(*LAYOUTS, plain=0.5),
        "grad_layout": Choice(*LAYOUTS, plain=0.5),
        "angles": Choice(*LAYOUTS, plain=0.6),
        "data": Seed(),
    },
    check_rope,
)
