"""What ops.mlp refuses, and in which words."""

from __future__ import annotations

import pytest
import torch
from mlp_reference import problem

import fp8


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": torch.zeros(4, 64, dtype=torch.int32)}, TypeError, "expected x in bfloat16"),
        ({"gate": torch.zeros(96, 64)}, TypeError, "expected gate in x's dtype bfloat16"),
        ({"down": torch.zeros(96).bfloat16()}, ValueError, r"expected down \[H, I\]"),
        ({"gate": torch.zeros(96, 60).bfloat16()}, ValueError, r"x's K = 64, got shape \[96, 60\]"),
        ({"up": torch.zeros(80, 64).bfloat16()}, ValueError, r"down's I = 96, got gate=\[96, 64\]"),
        ({"gate_bias": torch.zeros(5).bfloat16()}, ValueError, r"gate_bias of shape \[96\]"),
        ({"up_bias": torch.zeros(5).bfloat16()}, ValueError, r"up_bias of shape \[96\]"),
        ({"down_bias": torch.zeros(5).bfloat16()}, ValueError, r"down_bias of shape \[64\]"),
        ({"down_bias": torch.zeros(64)}, TypeError, "expected down_bias in x's dtype"),
        ({"x": torch.zeros(()).bfloat16()}, ValueError, "at least one dimension"),
    ],
)
def test_mlp_arguments(changes, error, match):
    case = problem("cpu")
    with pytest.raises(error, match=match):
        case.fused(case.leaves | changes)
    leaves = case.fresh()
    with pytest.raises(error, match=match):  # in the way of autograd
        case.fused(leaves | changes)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"activation": "tanh"}, ValueError, "expected an activation out of 'silu', 'gelu'"),
        ({"save": "int8"}, ValueError, "expected save 'bf16', 'fp8' or 'recompute', got 'int8'"),
        ({"recipe": "fast"}, ValueError, "recipe"),
        ({"gate_history": fp8.ops.make_history()}, ValueError, "expected the recipe 'delayed'"),
        (
            {"recipe": "delayed", "down_history": torch.zeros(3, 4, dtype=torch.int32)},
            ValueError,
            "expected down_history contiguous",
        ),
        (
            {"recipe": "delayed", "up_history": torch.zeros(3, 194)},
            TypeError,
            "expected up_history in int32",
        ),
    ],
)
def test_mlp_options(options, error, match):
    case = problem("cpu")
    with pytest.raises(error, match=match):
        case.fused(case.leaves, **options)


def test_mlp_forms():
    case = problem("cpu", form="plain")
    with pytest.raises(ValueError, match=r"\[2 I, K\], merged, or \[I, K\], plain"):
        case.fused(case.leaves | {"gate": torch.zeros(100, 64).bfloat16()})
    with pytest.raises(ValueError, match="expected no up_bias without up"):
        case.fused(case.leaves | {"up_bias": torch.zeros(96).bfloat16()})
    with pytest.raises(ValueError, match="expected gates for 'clamped_silu'"):
        case.fused(case.leaves, activation="clamped_silu")


def test_mlp_forward_mode_is_refused():
    case = problem("cpu")
    leaves = case.leaves
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaves["x"], torch.ones_like(leaves["x"]))
        with pytest.raises(NotImplementedError, match="fp8::mlp: expected reverse mode"):
            case.fused(dict(leaves, x=dual))
