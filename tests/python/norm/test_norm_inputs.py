"""What the norms take, where it lies, and what they refuse."""

from __future__ import annotations

import norm_reference as reference
import pytest
import torch
from inputs import expanded_views, strided_views
from norm_reference import DTYPES, FORMS, LAYER
from reference import assert_same_bits

OPS = torch.ops.fp8


def run(x, weight, form="scale_then_round"):
    if form == LAYER:
        return OPS.layer_norm(x, weight, None, 1e-6)
    return OPS.rms_norm(x, weight, 1e-6, form)


def check(x, weight, form="scale_then_round"):
    """As for a contiguous copy, forward and backward."""
    x, plain = x.detach().requires_grad_(), x.detach().clone(memory_format=torch.contiguous_format)
    plain.requires_grad_()
    y, expected = run(x, weight, form), run(plain, weight, form)
    assert y.is_contiguous()
    assert_same_bits(y, expected, "y")
    dy = torch.randn_like(expected)
    strange = torch.empty_like(dy.transpose(0, -2)).copy_(dy.transpose(0, -2)).transpose(0, -2)
    (dx,) = torch.autograd.grad(y, x, strange)
    assert_same_bits(dx, torch.autograd.grad(expected, plain, dy)[0], "dx")


@pytest.mark.parametrize("form", [FORMS[1], LAYER])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_strided_matrices(device, dtype, form):
    x = torch.randn(12, 56, device=device).to(dtype)
    weight = torch.randn(56, device=device).to(dtype)
    for view in (strided_views(x) | expanded_views(x)).values():
        check(view, weight, form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_of_heads(device, dtype):
    """q and k: heads of a row, heads of a part of a wider row, heads before positions."""
    weight = torch.randn(128, device=device).to(dtype)
    joint = torch.randn(2, 5, 9 * 128, device=device).to(dtype)
    wide = joint[..., 3 * 128 : 7 * 128]
    check(wide.unflatten(-1, (4, 128)), weight)
    check(joint.unflatten(-1, (9, 128)), weight)
    check(joint.unflatten(-1, (9, 128)).transpose(1, 2), weight)
    check(joint.unflatten(-1, (3, 3, 128)).transpose(1, 2), weight)  # four strides: copied
    check(joint[:1, :, 128:256], weight)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (3, 0), (0, 0), (0,), (1,), (2, 1)])
@pytest.mark.parametrize("form", [*FORMS, LAYER])
def test_norm_of_nothing(device, shape, form):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[-1:], device=device, requires_grad=True)
    y = run(x, weight, form)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    eager = reference.eager(x, weight, 1e-6, form)
    assert weight.grad.shape == weight.shape
    torch.testing.assert_close(y, eager)
    if x.numel() == 0:
        assert not weight.grad.any()
    if form in FORMS:
        added = OPS.add_rms_norm(x, x, weight, 1e-6, form)
        assert [t.shape for t in added] == [x.shape, x.shape]


def test_norm_of_one_dimension_and_weights_of_strides(device):
    x = torch.randn(40, device=device)
    weight = torch.randn(80, device=device)[::2]
    assert_same_bits(run(x, weight), run(x[None], weight.contiguous())[0], "1-D")


ERRORS = {
    "x's dtype": (
        lambda: OPS.rms_norm(torch.randn(3, 4).double()),
        TypeError,
        "fp8::rms_norm: expected x in bfloat16, float16 or float32, got float64",
    ),
    "weight's dtype": (
        lambda: OPS.layer_norm(torch.randn(3, 4), torch.ones(4).long()),
        TypeError,
        "fp8::layer_norm: expected weight in bfloat16, float16 or float32, got int64",
    ),
    "scalar": (
        lambda: OPS.rms_norm(torch.tensor(1.0)),
        ValueError,
        "fp8::rms_norm: expected x of at least one dimension, got a scalar",
    ),
    "weight's shape": (
        lambda: OPS.rms_norm(torch.randn(3, 4), torch.ones(3)),
        ValueError,
        r"fp8::rms_norm: expected weight of shape \[K\] = \[4\], got \[3\]",
    ),
    "bias's shape": (
        lambda: OPS.layer_norm(torch.randn(3, 4), None, torch.ones(1, 4)),
        ValueError,
        r"fp8::layer_norm: expected bias of shape \[K\] = \[4\], got \[1, 4\]",
    ),
    "form": (
        lambda: OPS.rms_norm(torch.randn(3, 4), None, None, "gemma"),
        ValueError,
        "fp8::rms_norm: expected form 'scale_then_round', 'round_then_scale' or "
        "'scale_by_one_plus', got 'gemma'",
    ),
    "residual's shape": (
        lambda: OPS.add_rms_norm(torch.randn(3, 4), torch.randn(4)),
        ValueError,
        r"fp8::add_rms_norm: expected residual of x's shape \[3, 4\], got \[4\]",
    ),
    "residual's dtype": (
        lambda: OPS.add_rms_norm(torch.randn(3, 4), torch.randn(3, 4).half()),
        TypeError,
        "fp8::add_rms_norm: expected residual in x's dtype float32, got float16",
    ),
    "device": (
        lambda: OPS.rms_norm(torch.randn(3, 4), torch.ones(4, device="meta")),
        ValueError,
        "fp8::rms_norm: expected weight on the device of x, cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_norm_errors(name):
    wrong, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        wrong()
