"""What rope refuses, and what it says then."""

from __future__ import annotations

import pytest
import torch

import fp8

OPS = torch.ops.fp8


def angles(*shape, dtype=torch.float32):
    return torch.randn(2, *shape).to(dtype)


def x(*shape, dtype=torch.float32):
    return torch.randn(shape or (2, 3, 5, 16)).to(dtype)


REFUSED = {
    "dtype of q": (TypeError, "expected q in bfloat16, float16 or float32, got float64", {"q": x(dtype=torch.float64)}),
    "dtype of k": (TypeError, "expected k in q's dtype float32, got float16", {"k": x(dtype=torch.float16)}),
    "columns of k": (ValueError, r"expected k of q's columns, 16, got \[2, 3, 5, 20\]", {"k": x(2, 3, 5, 20)}),
    "dimensions": (ValueError, "expected q of 1 to 4 dimensions", {"q": x(1, 2, 3, 5, 16), "k": None}),
    "columns of cos": (ValueError, r"expected cos to broadcast to q \[2, 3, 5, 16\], with rotary_dim = 12", {"cos": x(5, 8), "sin": x(5, 8), "rotary_dim": 12}),
    "positions of cos": (ValueError, r"expected cos to broadcast to q .* got \[4, 16\]", {"cos": x(4, 16)}),
    "positions of sin": (ValueError, r"expected sin to broadcast to q .* got \[4, 16\]", {"sin": x(4, 16)}),
    "dimensions of cos": (ValueError, "expected cos to broadcast to q", {"q": x(5, 16), "k": None, "cos": x(1, 5, 16), "sin": x(1, 5, 16)}),
    "cos and sin": (ValueError, r"expected cos and sin of as many columns, got \[5, 16\] and \[5, 8\]", {"sin": x(5, 8)}),
    "a scalar": (ValueError, "expected cos of at least one dimension, got a scalar", {"cos": torch.tensor(1.0)}),
    "dtype of sin": (TypeError, "expected cos and sin of one dtype, got float32 and float16", {"sin": x(5, 16).half()}),
    "dtype of cos": (TypeError, "expected cos in q's dtype float32 or in float32, got bfloat16", {"cos": x(5, 16).bfloat16(), "sin": x(5, 16).bfloat16()}),
    "odd": (ValueError, "expected an even rotary_dim of at most 16, the columns of q, got 15", {"cos": x(5, 15), "sin": x(5, 15)}),
    "negative": (ValueError, "expected an even rotary_dim", {"rotary_dim": -2}),
    "too many": (ValueError, "expected an even rotary_dim of at most 16, the columns of q, got 18", {"cos": x(5, 18), "sin": x(5, 18)}),
    "layout": (ValueError, "expected layout 'halves', 'interleaved' or 'interleaved_to_halves', got 'pairs'", {"layout": "pairs"}),
    "rounding": (ValueError, "expected rounding 'each', 'sum' or 'once', got 'never'", {"rounding": "never"}),
    "device": (ValueError, "expected cos on the device of q, cpu, got meta", {"cos": x(5, 16).to("meta")}),
    "device of k": (ValueError, "expected k on the device of q", {"k": x().to("meta")}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rope_refuses(name):
    error, message, changed = REFUSED[name]
    given = {"q": x(), "k": x(), "cos": x(5, 16), "sin": x(5, 16)} | changed
    tensors = [given.pop(name) for name in ("q", "k", "cos", "sin")]
    with pytest.raises(error, match=f"fp8::rope: {message}"):
        fp8.ops.rope(*tensors, **given)
    on_meta = [t if t is None else t.to("meta") for t in tensors]
    if "device" not in name:
        with pytest.raises(error, match=f"fp8::rope: {message}"):
            fp8.ops.rope(*on_meta, **given)


@pytest.mark.parametrize("place", [0, 1])
def test_rope_of_angles_with_gradients(device, place):
    tensors = angles(5, 16).to(device)
    both = [t.clone().requires_grad_(i == place) for i, t in enumerate(tensors)]
    q = x().to(device)
    with pytest.raises(NotImplementedError, match="expected cos and sin without a gradient"):
        fp8.ops.rope(q.requires_grad_(), None, *both)
    with torch.no_grad():
        made, _ = fp8.ops.rope(q, None, *both)
    expected, _ = fp8.ops.rope(q.detach(), None, *tensors)
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": None, "k": None}, "expected q or k, got neither"),
        ({"form": 64}, "expected the number of a form, got 64"),
        ({"form": 3}, "expected the number of a form, got 3"),
        ({"q_order": [0, 1, 3, 2]}, "expected an order of 4 dimensions with the last one last"),
        ({"q_order": [0, 1, 2]}, "expected an order of 4 dimensions"),
        ({"q_order": [0, 0, 2, 3]}, "expected an order of 4 dimensions"),
        ({"dtype": torch.bfloat16, "cos": x(5, 16).half(), "q": x().half()}, "expected dtype float16"),
        ({"dtype": torch.float16, "q": x().bfloat16()}, "expected dtype bfloat16"),
    ],
)
def test_private_rope_refuses(changed, message):
    given = {"q": x(), "k": None, "cos": x(5, 16), "sin": x(5, 16), "rotary_dim": 16, "form": 0}
    given |= {"dtype": None, "q_order": [], "k_order": []} | changed
    if given["cos"].dtype != given["sin"].dtype:
        given["sin"] = given["sin"].to(given["cos"].dtype)
    with pytest.raises((TypeError, ValueError), match=f"fp8::_rope: {message}"):
        OPS._rope(**given)
