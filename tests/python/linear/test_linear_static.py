"""fused_linear with input_scale: x quantized with a static scale, all else as ever."""

from __future__ import annotations

import pytest
import torch
from linear_reference import ONE_SCALE, RECIPES
from reference import E4M3, E5M2, FLOAT_DTYPES, as_matrix, assert_same_bits
from test_linear_values import problem

import fp8

OPS = torch.ops.fp8
OP = r"fp8::fused_linear: .*"


def expected_of(x, weight, bias, dy, scale, power_of_two=False):
    """y, dx and dW written out with the public operators."""
    x2, dy2 = as_matrix(x), as_matrix(dy)
    option = {"power_of_two": power_of_two}
    qx, qx_t, sx = OPS.quantize_tensorwise_transpose(x2, E4M3, scale)
    qw, qw_t, sw = OPS.quantize_tensorwise_transpose(weight, E4M3, **option)
    qdy, qdy_t, sdy = OPS.quantize_tensorwise_transpose(dy2, E5M2, **option)
    y = OPS.scaled_mm(qx, qw, sx, sw, bias, x.dtype, True)
    dx = OPS.scaled_mm(qdy, qw_t, sdy, sw, None, x.dtype, False)
    dw = OPS.scaled_mm(qdy_t, qx_t, sdy, sx, None, weight.dtype, False)
    return y.reshape(*x.shape[:-1], -1), dx.reshape(x.shape), dw


@pytest.mark.parametrize("option", ["", ":power_of_two"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(128, 96), (2, 9, 48), (17, 33), (1, 96), (40,)], ids=str)
@pytest.mark.parametrize("value", [0.01, 2.0**-7, 3e-4, 10.0])
def test_fused_linear_static_values(device, value, shape, dtype, option, poisoned_memory):
    """Scales that fit the values, that saturate many, and that flush many to zero."""
    x, weight, bias, dy = problem(shape, 40, dtype, device)
    scale = torch.tensor(value, device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = OPS.fused_linear(*leaves, f"tensorwise{option}", input_scale=scale)
    dx, dw, _ = torch.autograd.grad(y, leaves, dy)
    plain = [tensor.detach() for tensor in (x, weight, bias, dy)]
    expected = expected_of(*plain, scale, option != "")
    for ours, theirs, name in zip((y, dx, dw), expected, ("y", "dx", "dw"), strict=True):
        assert_same_bits(ours.detach(), theirs, name)
    with torch.no_grad():
        again = OPS.fused_linear(*leaves, f"tensorwise{option}", input_scale=scale)
    assert_same_bits(again, y.detach(), "y without gradients")


def test_fused_linear_static_with_the_dynamic_scale_is_the_dynamic_product(device):
    """With a power of two: 1 / (1 / multiplier) is the multiplier again."""
    x, weight, bias, dy = problem((64, 96), 48, torch.bfloat16, device)
    recipe = "tensorwise:power_of_two"
    scale = OPS.quantize_tensorwise(x, power_of_two=True)[1]
    results = []
    for given in (None, scale):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        y = OPS.fused_linear(*leaves, recipe, input_scale=given)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours.detach(), theirs.detach())


@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 32), (8, 0)], ids=str)
def test_fused_linear_static_without_elements(device, shape):
    x, weight, bias, dy = problem(shape, 16, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = OPS.fused_linear(*leaves, input_scale=torch.tensor(0.1, device=device))
    assert y.shape == (*shape[:-1], 16)
    for gradient, leaf in zip(torch.autograd.grad(y, leaves, dy), leaves, strict=True):
        assert gradient.shape == leaf.shape


def test_fused_linear_static_saturates_and_keeps_nan(device):
    """Inf saturates with a static scale, as in quantize_tensorwise; NaN stays, in its row alone."""
    x, weight, _, _ = problem((6, 32), 16, torch.bfloat16, device)
    x[1, 3], x[4, 5] = float("inf"), float("nan")
    scale = torch.tensor(0.01, device=device)
    y = OPS.fused_linear(x, weight, input_scale=scale)
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [4]
    clamped = x.clone()
    clamped[1, 3] = 4.48
    assert_same_bits(y[:4], OPS.fused_linear(clamped, weight, input_scale=scale)[:4])


def test_fused_linear_static_scale_of_other_shapes_and_strides(device):
    x, weight, bias, _ = problem((16, 32), 48, torch.bfloat16, device)
    expected = OPS.fused_linear(x, weight, bias, input_scale=torch.tensor(0.02, device=device))
    for scale in (
        torch.full((1,), 0.02, device=device),
        torch.full((1, 1), 0.02, device=device),
        torch.full((7,), 0.02, device=device)[3:4],
        torch.full((7,), 0.02, device=device)[3],  # a view off 16 bytes
    ):
        assert_same_bits(OPS.fused_linear(x, weight, bias, input_scale=scale), expected)


def test_fused_linear_static_scale_may_change_before_the_backward(device):
    """The backward has its own copy: the scale that x was quantized with."""
    x, weight, _, dy = problem((16, 32), 48, torch.bfloat16, device)
    weight.requires_grad_()
    scale = torch.tensor(0.02, device=device)
    expected = torch.autograd.grad(OPS.fused_linear(x, weight, input_scale=scale), weight, dy)[0]
    y = OPS.fused_linear(x, weight, input_scale=scale)
    scale.fill_(100.0)
    assert_same_bits(torch.autograd.grad(y, weight, dy)[0], expected)


def test_fused_linear_static_under_autocast(device):
    """x, weight and bias are cast; the scale stays fp32."""
    x, weight, bias, _ = problem((16, 32), 48, torch.float32, device)
    scale = torch.tensor(0.0123, device=device)
    cast = [tensor.bfloat16() for tensor in (x, weight, bias)]
    with torch.autocast(device, torch.bfloat16):
        y = OPS.fused_linear(x, weight, bias, input_scale=scale)
    assert_same_bits(y, OPS.fused_linear(*cast, input_scale=scale))


def test_fused_linear_static_does_not_share_inputs(device):
    """Neither does what is remembered of x serve a static call, nor the other way round."""
    torch.manual_seed(0)
    layer = fp8.Linear(64, 48, device=device, dtype=torch.bfloat16)
    x = torch.randn(32, 64, device=device, dtype=torch.bfloat16, requires_grad=True) * 1
    call = {
        name: lambda x, s=scale: OPS.fused_linear(x, layer.weight, layer.bias, input_scale=s)
        for name, scale in (
            ("dynamic", None),
            ("small", torch.tensor(0.001, device=device)),
            ("large", torch.tensor(0.5, device=device)),
        )
    }
    alone = {name: call[name](x.clone()) for name in call}
    for order in (("dynamic", "small", "large"), ("large", "small", "dynamic"), ("small",) * 2):
        for name in order:
            assert_same_bits(call[name](x).detach(), alone[name].detach(), name)


@pytest.mark.parametrize("to_device", [lambda t: t, lambda t: t.to("meta")], ids=["real", "meta"])
def test_fused_linear_static_errors(device, to_device):
    x, weight, bias = map(to_device, problem((16, 32), 48, torch.bfloat16, device)[:3])
    scale = torch.ones((), device=x.device)
    for recipe in set(RECIPES) - set(ONE_SCALE):
        with pytest.raises(ValueError, match=OP + f"one scale per tensor.*got '{recipe}'"):
            OPS.fused_linear(x, weight, bias, recipe, input_scale=scale)
    with pytest.raises(TypeError, match=OP + "input_scale in float32, got float64"):
        OPS.fused_linear(x, weight, bias, input_scale=scale.double())
    with pytest.raises(ValueError, match=OP + r"input_scale of one element, got shape \[2\]"):
        OPS.fused_linear(x, weight, bias, input_scale=scale.expand(2))
    other = torch.ones((), device="cpu" if x.is_meta else "meta")
    with pytest.raises(ValueError, match=OP + f"input_scale on the device of x.*{other.device}"):
        OPS.fused_linear(x, weight, bias, input_scale=other)
    with pytest.raises(ValueError, match=OP + "input_scale without requires_grad"):
        OPS.fused_linear(x, weight, bias, input_scale=scale.clone().requires_grad_())
    with torch.no_grad():
        OPS.fused_linear(x, weight, bias, input_scale=scale.clone().requires_grad_())


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16])
def test_fused_linear_static_with_main_grad(device, buffer_dtype):
    x, weight, bias, dy = problem((48, 32), 64, torch.bfloat16, device)
    layer = fp8.Linear.from_linear(torch.nn.Linear(32, 64, device=device, dtype=torch.bfloat16))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    layer.input_scale = torch.tensor(0.004, device=device)
    layer.weight.main_grad = torch.zeros(64, 32, device=device, dtype=buffer_dtype)
    y = layer(x)
    y.backward(dy)
    expected = expected_of(x, weight, bias, dy, layer.input_scale)
    assert_same_bits(y.detach(), expected[0])
    assert layer.weight.grad is None
    wide = expected[2].float()
    torch.testing.assert_close(
        layer.weight.main_grad.float(), wide, rtol=2**-7, atol=2**-7 * wide.abs().max().item()
    )
    with torch.no_grad():
        assert_same_bits(layer(x), expected[0])
