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


ANGLES = {"cos": x(5, 16), "sin": x(5, 16)}
TO_Q = "expected cos to broadcast to q"
REFUSED = {
    "expected q in bfloat16, float16 or float32, got float64": {"q": x().double()},
    "expected k in q's dtype float32, got float16": {"k": x().half()},
    r"expected k of q's columns, 16, got \[2, 3, 5, 20\]": {"k": x(2, 3, 5, 20)},
    "expected q of 1 to 4 dimensions": {"q": x(1, 2, 3, 5, 16), "k": None},
    rf"{TO_Q} \[2, 3, 5, 16\], with rotary_dim = 12": {
        "cos": x(5, 8),
        "sin": x(5, 8),
        "rotary_dim": 12,
    },
    rf"{TO_Q} .* got \[4, 16\]": {"cos": x(4, 16)},
    r"expected sin to broadcast to q .* got \[4, 16\]": {"sin": x(4, 16)},
    rf"{TO_Q} \[5, 16\]": {"q": x(5, 16), "k": None, "cos": x(1, 5, 16)},
    r"expected cos and sin of as many columns, got \[5, 16\] and \[5, 8\]": {"sin": x(5, 8)},
    "expected cos of at least one dimension, got a scalar": {"cos": torch.tensor(1.0)},
    "expected cos and sin of one dtype, got float32 and float16": {"sin": x(5, 16).half()},
    "expected cos in q's dtype float32 or in float32, got bfloat16": {
        name: angles.bfloat16() for name, angles in ANGLES.items()
    },
    "expected an even rotary_dim of at most 16, the columns of q, got 15": {
        name: angles[:, :15] for name, angles in ANGLES.items()
    },
    "expected an even rotary_dim of at most 16, the columns of q, got -2": {"rotary_dim": -2},
    "expected an even rotary_dim of at most 16, the columns of q, got 18": {"rotary_dim": 18},
    "expected layout 'halves', 'interleaved' or 'interleaved_to_halves', got 'pairs'": {
        "layout": "pairs"
    },
    "expected rounding 'each', 'sum' or 'once', got 'never'": {"rounding": "never"},
    "expected cos on the device of q, cpu, got meta": {"cos": x(5, 16).to("meta")},
    "expected k on the device of q": {"k": x().to("meta")},
}
TYPE_ERRORS = ("in bfloat16", "dtype")


@pytest.mark.parametrize("message", REFUSED)
def test_rope_refuses(message):
    error = TypeError if any(word in message for word in TYPE_ERRORS) else ValueError
    given = {"q": x(), "k": x()} | ANGLES | REFUSED[message]
    tensors = [given.pop(name) for name in ("q", "k", "cos", "sin")]
    with pytest.raises(error, match=f"fp8::rope: {message}"):
        fp8.ops.rope(*tensors, **given)
    on_meta = [t if t is None else t.to("meta") for t in tensors]
    if "device" not in message:
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
        (
            {"dtype": torch.bfloat16, "cos": x(5, 16).half(), "q": x().half()},
            "expected dtype float16",
        ),
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
