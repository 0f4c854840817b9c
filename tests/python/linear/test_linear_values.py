"""fused_linear, both ways: bit for bit what its recipe composes, and near the fp64 linear."""

from __future__ import annotations

import inputs
import linear_reference
import pytest
import torch
from linear_reference import ONE_SCALE, RECIPES, WITH_OPTIONS
from reference import FLOAT_DTYPES, assert_same_bits, sqnr

OPS = torch.ops.fp8


def problem(shape, n, dtype=torch.bfloat16, device="cpu", kind="normal"):
    """x, weight, bias, dy."""
    k = shape[-1]
    x = inputs.make(kind, shape, dtype, device)
    weight = (torch.randn(n, k) / max(k, 1) ** 0.5).to(dtype).to(device)
    bias = torch.randn(n).to(dtype).to(device)
    dy = (torch.randn(*shape[:-1], n) * 0.1).to(dtype).to(device)
    return x, weight, bias, dy


def check(x, weight, bias, dy, recipe):
    actual = linear_reference.run(x, weight, bias, dy, recipe)
    expected = linear_reference.linear(x, weight, bias, dy, recipe)
    linear_reference.assert_matches(actual, expected, x, dy, recipe)
    assert actual.y.dtype == actual.dx.dtype == x.dtype
    assert actual.dw.dtype == weight.dtype
    assert actual.y.shape == (*x.shape[:-1], weight.shape[0])
    assert actual.y.is_contiguous()
    return actual


@pytest.mark.parametrize("recipe", WITH_OPTIONS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_fused_linear_composes_the_public_ops(device, with_bias, dtype, recipe, poisoned_memory):
    x, weight, bias, dy = problem((128, 96), 160, dtype, device)
    check(x, weight, bias if with_bias else None, dy, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ((96,), 32),
        ((1, 96), 32),
        ((40, 32), 16),
        ((17, 33), 65),
        ((5, 7), 3),
        ((1, 1), 1),
        ((2, 9, 48), 64),
        ((2, 3, 5, 20), 24),
        ((2, 1, 2, 3, 16), 40),
        ((129, 130), 131),
    ],
    ids=str,
)
def test_fused_linear_shapes(device, shape, n, recipe, poisoned_memory):
    for dtype in (torch.bfloat16, torch.float32):
        check(*problem(shape, n, dtype, device), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("shape", "n"),
    [((0, 32), 16), ((3, 0, 32), 16), ((8, 0), 16), ((8, 32), 0), ((0, 0), 0), ((0,), 5)],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_fused_linear_without_elements(device, shape, n, recipe, with_bias, poisoned_memory):
    """M, K or N = 0: the shapes and values of nn.Linear (a sum over nothing is zero)."""
    x, weight, bias, dy = problem(shape, n, torch.float32, device)
    given = bias if with_bias else None
    actual = linear_reference.run(x, weight, given, dy, recipe)
    wanted = [
        t.detach().requires_grad_() for t in ((x, weight, bias) if with_bias else (x, weight))
    ]
    y = torch.nn.functional.linear(*wanted)
    expected = (y.detach(), *torch.autograd.grad(y, wanted, dy))
    for ours, theirs in zip((t for t in actual if t is not None), expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("recipe", WITH_OPTIONS)
@pytest.mark.parametrize("kind", ["student_t", "lognormal", "zeros", "subnormal"])
def test_fused_linear_kinds_of_values(device, kind, recipe):
    check(*problem((64, 80), 48, torch.float32, device, kind), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("view", list(inputs.strided_views(torch.zeros(2, 2))))
def test_fused_linear_strided_operands(device, view, recipe):
    x, weight, bias, dy = problem((40, 56), 72, torch.bfloat16, device)
    expected = linear_reference.run(x, weight, bias, dy, recipe)
    strided = [inputs.strided_views(tensor)[view] for tensor in (x, weight, dy)]
    actual = linear_reference.run(
        strided[0], strided[1], bias.repeat(2)[::2].copy_(bias), strided[2], recipe
    )
    for name, ours, theirs in zip(actual._fields, actual, expected, strict=True):
        if name == "db" or (name == "dw" and linear_reference.high_precision_wgrad(recipe)):
            # A sum of dy itself, whose order may follow the strides.
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-2)
        else:
            assert_same_bits(ours, theirs, name)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("view", list(inputs.expanded_views(torch.zeros(2, 2))))
def test_fused_linear_expanded_operands(device, view, recipe):
    x, weight, bias, dy = problem((48, 64), 32, torch.bfloat16, device)
    views = [inputs.expanded_views(tensor)[view] for tensor in (x, weight, dy)]
    check(views[0], weight, bias, dy, recipe)
    check(x, views[1], bias, dy, recipe)
    check(x, weight, bias, views[2], recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_gradients_of_usual_losses(device, recipe):
    """y.sum() gives an expanded gradient, a loss on y.t() a transposed one."""
    x, weight, bias, _ = problem((2, 24, 64), 48, torch.bfloat16, device)
    y_shape = (2, 24, 48)
    factor = torch.randn(48, 48, device=device, dtype=torch.bfloat16)
    losses = {
        "sum": (lambda y: y.sum(), torch.ones(y_shape, device=device, dtype=torch.bfloat16)),
        "transposed": (lambda y: (y.view(48, 48).t() * factor).sum(), factor.t().reshape(y_shape)),
    }
    for name, (loss, dy) in losses.items():
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        loss(OPS.fused_linear(*leaves, recipe)).backward()
        expected = linear_reference.linear(x, weight, bias, dy, recipe)
        actual = linear_reference.Result(expected.y, *(leaf.grad for leaf in leaves))
        linear_reference.assert_matches(actual, expected, x, dy, recipe)
        assert leaves[0].grad.shape == x.shape, name


@pytest.mark.parametrize("recipe", WITH_OPTIONS)
def test_fused_linear_is_near_the_fp64_linear(device, recipe):
    """Of randn data e4m3 keeps about 31.5 dB and e5m2 25.5, with scales that are powers of two as
    with others; two operands' noises add up."""
    x, weight, bias, dy = problem((512, 256), 384, torch.float32, device)
    actual = linear_reference.run(x, weight, bias, dy, recipe)
    x64, w64, dy64 = x.double(), weight.double(), dy.double()
    floor = 23.5 if recipe.startswith(ONE_SCALE) else 27.5
    floor_dw = 100 if linear_reference.high_precision_wgrad(recipe) else floor
    assert sqnr(actual.y, x64 @ w64.t() + bias.double()) >= 28
    assert sqnr(actual.dx, dy64 @ w64) >= floor
    assert sqnr(actual.dw, dy64.t() @ x64) >= floor_dw
    assert sqnr(actual.db, dy64.sum(0)) >= 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_bias_gradient_is_accumulated_in_fp32(device, recipe, dtype):
    """4096 rows of 1 + 1/4: a 16-bit running sum would stop near 256 (bf16) or 2048 (fp16)."""
    x = torch.randn(4096, 32, device=device, dtype=dtype)
    weight = torch.randn(16, 32, device=device, dtype=dtype)
    bias = torch.zeros(16, device=device, dtype=dtype, requires_grad=True)
    dy = torch.full((4096, 16), 1.25, device=device, dtype=dtype)
    OPS.fused_linear(x, weight, bias, recipe).backward(dy)
    assert bias.grad.dtype == dtype
    assert (bias.grad == 5120).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_is_deterministic(device, recipe):
    arguments = problem((256, 192), 224, torch.bfloat16, device)
    first = linear_reference.run(*arguments, recipe)
    for _ in range(3):
        for name, a, b in zip(
            first._fields, linear_reference.run(*arguments, recipe), first, strict=True
        ):
            assert_same_bits(a, b, name)


def test_fused_linear_defaults_to_tensorwise_without_bias(device):
    x, weight, _, dy = problem((16, 32), 48, torch.bfloat16, device)
    expected = linear_reference.linear(x, weight, None, dy, "tensorwise").y
    assert_same_bits(OPS.fused_linear(x, weight), expected)
