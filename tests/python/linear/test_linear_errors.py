"""fused_linear refuses what nn.Linear refuses, says what it expected and what came, and never hides
a NaN."""

from __future__ import annotations

import linear_reference
import pytest
import torch
from linear_reference import ONE_SCALE, RECIPES
from test_linear_values import problem

OPS = torch.ops.fp8
OP = r"fp8::fused_linear: .*"


@pytest.fixture
def tensors(device):
    return problem((16, 32), 48, torch.bfloat16, device)[:3]


def test_fused_linear_error_unknown_recipe(tensors):
    names = ("fp4", "", "Tensorwise", "rowwise ", ":", ":power_of_two")
    options = ("rowwise:", "rowwise:pow2", "rowwise:power_of_two:", "rowwise power_of_two")
    twice = "rowwise:power_of_two:power_of_two"
    for name in (*names, *options, twice):
        known = ".*".join(RECIPES) + f".*':power_of_two', got '{name}'"
        with pytest.raises(ValueError, match=OP + "recipe.*" + known):
            OPS.fused_linear(*tensors, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_error_shapes(tensors, recipe):
    x, weight, bias = tensors
    with pytest.raises(ValueError, match=OP + r"share K.*\[16, 31\].*\[48, 32\]"):
        OPS.fused_linear(x[:, 1:], weight, bias, recipe)
    for wrong, shown in (
        (bias[1:], r"\[47\]"),
        (bias.unsqueeze(0), r"\[1, 48\]"),
        (bias[0], r"\[\]"),
    ):
        with pytest.raises(ValueError, match=OP + "bias.*" + shown):
            OPS.fused_linear(x, weight, wrong, recipe)
    for wrong, shown in ((weight[0], r"\[32\]"), (weight.unsqueeze(0), r"\[1, 48, 32\]")):
        with pytest.raises(ValueError, match=OP + "weight.*" + shown):
            OPS.fused_linear(x, wrong, bias, recipe)
    with pytest.raises(ValueError, match=OP + r"x.*dimension"):
        OPS.fused_linear(x[0, 0], weight, bias, recipe)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.int32, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_fused_linear_error_dtypes(tensors, dtype):
    """All three alike in a dtype that is not supported."""
    wrong = [tensor.float().to(dtype) for tensor in tensors]
    with pytest.raises(TypeError, match=OP + "(bfloat16|BFloat16)"):
        OPS.fused_linear(*wrong)


def test_fused_linear_error_mixed_dtypes(tensors):
    """Outside of autocast nothing is cast in silence."""
    x, weight, bias = tensors
    for args, named in (
        ((x.float(), weight, bias), "weight|x"),
        ((x, weight.float(), bias), "weight"),
        ((x, weight, bias.float()), "bias"),
        ((x.half(), weight, bias), "weight|x"),
    ):
        with pytest.raises(TypeError, match=OP + f"({named})"):
            OPS.fused_linear(*args)


def test_fused_linear_error_devices(tensors):
    for position in range(3):
        mixed = [t.to("meta") if i == position else t for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=OP + "meta"):
            OPS.fused_linear(*mixed)


@pytest.mark.gpu
def test_fused_linear_error_cpu_and_cuda():
    x, weight, bias, _ = problem((16, 32), 48)
    with pytest.raises(ValueError, match=OP + "cuda.*cpu|cpu.*cuda"):
        OPS.fused_linear(x.cuda(), weight, bias)


def test_fused_linear_error_number_of_arguments(tensors):
    with pytest.raises(RuntimeError, match="fp8::fused_linear"):
        OPS.fused_linear(*tensors, "tensorwise", 1)
    with pytest.raises(RuntimeError, match="fp8::fused_linear"):
        OPS.fused_linear(tensors[0])
    with pytest.raises(RuntimeError, match="fp8::fused_linear"):
        OPS.fused_linear(*tensors, 3)


def test_fused_linear_error_in_the_gradient_of_another_dtype(tensors):
    """autograd itself refuses it, before we see it."""
    x, weight, bias = tensors
    y = OPS.fused_linear(x.requires_grad_(), weight, bias)
    with pytest.raises(RuntimeError):
        y.backward(torch.ones(16, 47, device=x.device, dtype=x.dtype))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_private_backward_refuses_codes_that_no_product_reads(device, recipe):
    x, weight, _, dy = problem((64, 96), 80, torch.bfloat16, device)
    index = list(RECIPES).index(recipe)
    _, x_t, scale, _ = OPS._linear_forward(x, weight, None, index, True, False)
    bad = (
        (x_t.bfloat16(), scale, TypeError, "x_t in float8_e4m3fn or float8_e5m2, got bfloat16"),
        (x_t.t(), scale, ValueError, r"x_t contiguous.* 96 rows.*, got shape \[64, 96\]"),
        (x_t[:80], scale, ValueError, r"x_t contiguous.* 96 rows.*, got shape \[80, 64\]"),
        (x_t[:, :40], scale, ValueError, r"x_t contiguous.* of 16 columns, got shape \[96, 40\]"),
        (x_t, scale.double(), TypeError, "scale of x_t in float32, got float64"),
        (x_t, scale.new_ones(3), ValueError, r"scale of x_t .* \[96, 64\], got shape \[3\]"),
    )
    for codes, of_codes, error, words in bad:
        with pytest.raises(error, match="fp8::_linear_backward: expected (the )?" + words):
            OPS._linear_backward(dy, codes, of_codes, None, None, 96, index, False, True, False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_non_finite_input(device, recipe, bad):
    """rowwise: the row alone. tensorwise: everything, forward and wgrad."""
    x, weight, bias, dy = problem((64, 96), 80, torch.bfloat16, device)
    x[5, 7] = bad
    weight.requires_grad_()
    y = OPS.fused_linear(x, weight, bias, recipe)
    y.backward(dy)
    if recipe in ONE_SCALE:
        assert not y.isfinite().any()
        assert not weight.grad.isfinite().any()
        return
    bad_rows = (~y.isfinite()).any(1).nonzero().flatten().tolist()
    assert bad_rows == [5]
    assert not y[5].isfinite().any()
    bad_columns = (~weight.grad.isfinite()).any(0).nonzero().flatten().tolist()
    assert bad_columns == [7], "wgrad scales x along M: one scale per column"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_linear_non_finite_gradient(device, recipe, bad):
    """What a gradient scaler looks for: Inf or NaN in dy reaches dx, dW and db."""
    x, weight, bias, dy = problem((64, 96), 80, torch.bfloat16, device)
    dy[3, 4] = bad
    _, dx, dw, db = linear_reference.run(x, weight, bias, dy, recipe)
    for gradient in (dx, dw, db):
        assert not gradient.isfinite().all()
    assert (~db.isfinite()).nonzero().flatten().tolist() == [4]
    if recipe not in ONE_SCALE:
        assert (~dx.isfinite()).any(1).nonzero().flatten().tolist() == [3]
        assert (~dw.isfinite()).any(1).nonzero().flatten().tolist() == [4]
