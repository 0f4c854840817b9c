"""experts_frozen refuses what it cannot compute, and says what it expected and what came."""

from __future__ import annotations

import pytest
import torch
from experts_problem import leaves_of, problem, with_leaves

import fp8

OP = r"fp8::experts_frozen: .*"
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("x", torch.randn(2, 3, 64), ValueError, r"expected x \[T, H\]"),
        ("x", torch.randn(96, 64).double(), TypeError, "expected x in bfloat16"),
        ("index", torch.zeros(96, 2), TypeError, "top_k_index in int64, got float32"),
        ("index", torch.zeros(5, 2).long(), ValueError, "T = 96"),
        ("weights", torch.zeros(96, 3), ValueError, "top_k_weights of top_k_index's shape"),
        ("gate_up", torch.randn(6, 96, 64), TypeError, "gate_up in float8_e4m3fn, got float32"),
        ("down", torch.zeros(6, 64, 48).to(torch.float8_e5m2), TypeError, "down in float8_e4m3fn"),
        ("gate_up", torch.zeros(6, 96, 48).to(E4M3), ValueError, r"= \[6, 96, 64\]"),
        ("down", torch.zeros(6, 48, 48).to(E4M3), ValueError, r"down \[E, H, I\] with H = 64"),
        ("gate_up_scale", torch.ones(6, 96).double(), TypeError, "gate_up_scale in float32"),
        ("down_scale", torch.ones(6, 64).bfloat16(), TypeError, "down_scale in float32"),
        (
            "gate_up_scale",
            torch.ones(6, 95, 1),
            ValueError,
            r"\[6\] .* \[6, 96, 1\] .* \[6, 1, 1\] .* got shape \[6, 95, 1\]",
        ),
        ("down_scale", torch.ones(()), ValueError, r"down_scale of shape \[6\].*got shape \[\]"),
        ("down_scale", torch.ones(6, 48, 1), ValueError, r"\[6, 64, 1\].*got shape \[6, 48, 1\]"),
        ("gate_up_bias", torch.randn(6, 64).bfloat16(), ValueError, r"gate_up_bias .*\[6, 96\]"),
        ("down_bias", torch.randn(6, 64), TypeError, "down_bias in x's dtype bfloat16"),
    ],
)
def test_experts_frozen_errors(name, value, error, match):
    p = problem(bias=True)
    with pytest.raises(error, match=OP + match):
        fp8.ops.experts_frozen(*p._replace(**{name: value}).args())


def test_experts_frozen_error_options():
    p = problem()
    with pytest.raises(ValueError, match=OP + "activation out of 'silu', .* got 'relu'"):
        fp8.ops.experts_frozen(*p.args(), activation="relu")
    with pytest.raises(ValueError, match=OP + "'rowwise' or 'blockwise', got 'tensorwise'"):
        fp8.ops.experts_frozen(*p.args(), input_granularity="tensorwise")
    with pytest.raises(ValueError, match=OP + r"\(one for each 128x128 block\).*got shape \[6, 96"):
        fp8.ops.experts_frozen(*p.args(), input_granularity="blockwise")
    blocks = problem("blockwise", hidden=256, features=256)
    with pytest.raises(ValueError, match=OP + r"gate_up_scale of shape \[6\].*\[6, 4, 2\]"):
        fp8.ops.experts_frozen(*blocks.args(), input_granularity="rowwise")
    mixed = blocks._replace(down_scale=torch.ones(6, 256, 1))
    with pytest.raises(ValueError, match=OP + r"or, of both weights, .*got shape \[6, 4, 2\]"):
        fp8.ops.experts_frozen(*mixed.args())


def test_experts_frozen_error_extents():
    p = problem(hidden=64, features=48)
    odd = p._replace(
        gate_up=p.gate_up[:, : 2 * 40], down=p.down[:, :, :40],
        gate_up_scale=p.gate_up_scale[:, : 2 * 40],
    )  # fmt: skip
    with pytest.raises(ValueError, match=OP + "multiples of 16, got H = 64, I = 40"):
        fp8.ops.experts_frozen(*odd.args())


def test_experts_frozen_error_gradients():
    p = problem()
    leaves = leaves_of(p)
    scale = p.down_scale.clone().requires_grad_()
    with pytest.raises(ValueError, match=OP + "without requires_grad.*moe_experts"):
        fp8.ops.experts_frozen(*p._replace(down_scale=scale).args())
    with pytest.raises(NotImplementedError, match=OP + "jvp"):
        torch.func.jvp(lambda x: fp8.ops.experts_frozen(*p._replace(x=x).args()), (p.x,), (p.x,))
    y = fp8.ops.experts_frozen(*with_leaves(p, leaves))
    (dx,) = torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .*_experts_frozen_backward is not"):
        dx.sum().backward()


@pytest.mark.gpu
def test_experts_frozen_error_devices():
    p = problem(device="cuda")
    for name in ("index", "weights", "gate_up", "down", "gate_up_scale", "down_scale"):
        moved = p._replace(**{name: getattr(p, name).cpu()})
        with pytest.raises(ValueError, match=OP + "on the device of"):
            fp8.ops.experts_frozen(*moved.args())
