"""What merged_linear refuses: each message names the operator, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

import fp8

X, W, V = torch.randn(4, 32), torch.randn(16, 32), torch.randn(8, 32)
B = torch.randn(16)

CASES = [
    (ValueError, "expected 1 to 62 weights, got 0", (X, [])),
    (ValueError, "expected 1 to 62 weights, got 63", (X, [W] * 63)),
    (ValueError, r"a bias or None for each of 2 weights, got 1", (X, [W, V], [B])),
    (
        ValueError,
        r"x and weight 1 must share K, got x=\[4, 32\], weight=\[8, 16\]",
        (X, [W, V[:, :16]]),
    ),
    (ValueError, r"expected weight 1 \[N, K\], got shape \[32\]", (X, [W, V[0]])),
    (ValueError, r"expected bias 1 of shape \[N\] = \[8\], got \[16\]", (X, [W, V], [None, B])),
    (ValueError, "x of at least one dimension, got a scalar", (torch.tensor(1.0), [W])),
    (ValueError, "expected weight 0|a weight on the device", (X, [W.to("meta")])),
    (TypeError, "expected weight 1 in x's dtype float32, got bfloat16", (X, [W, V.bfloat16()])),
    (TypeError, "expected bias 0 in x's dtype float32, got float16", (X, [W], [B.half()])),
    (TypeError, "expected x in bfloat16, float16 or float32, got float64", (X.double(), [W])),
    (ValueError, "recipe", (X, [W], None, "unknown")),
]


@pytest.mark.parametrize(("kind", "message", "args"), CASES, ids=[c[1][:40] for c in CASES])
def test_merged_refuses(kind, message, args):
    with pytest.raises(kind, match=message):
        fp8.ops.merged_linear(*args)


def test_merged_refuses_a_history_of_another_recipe():
    with pytest.raises(ValueError, match="recipe 'delayed' with a history, got 'tensorwise'"):
        fp8.ops.merged_linear(X, [W, V], history=fp8.ops.make_history())


def test_merged_backward_refuses_what_does_not_fit():
    backward = torch.ops.fp8._merged_backward
    y, x_t, scale, amax = torch.ops.fp8._merged_forward(X, [W, V], None, 0, True, True)
    dys = [y[:, :16].contiguous(), y[:, 16:].contiguous()]
    with pytest.raises(ValueError, match="a weight for each of 2 gradients, got 1"):
        backward(dys, x_t, scale, [W], amax, 32, 0, True, 3, False)
    with pytest.raises(ValueError, match=r"weight 1 of shape \[8, 32\], got \[16, 32\]"):
        backward(dys, x_t, scale, [W, W], amax, 32, 0, True, 3, False)
    with pytest.raises(ValueError, match=r"of one leading shape, got \[4, 16\] and \[2, 8\]"):
        backward([dys[0], dys[1][:2]], x_t, scale, [W, V], amax, 32, 0, True, 3, False)
    with pytest.raises(ValueError, match="expected weight_amax with the recipe 'tensorwise'"):
        backward(dys, x_t, scale, [W, V], None, 32, 0, True, 3, False)
    with pytest.raises(ValueError, match="expected x, or x_t, with the recipe"):
        backward(dys, None, None, [W, V], amax, 32, 0, False, 3, False)
