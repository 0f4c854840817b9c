"""Nested tensors through fp8.Linear and fused_linear, as through nn.Linear."""

from __future__ import annotations

import pytest
import torch

import fp8

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
RECIPES = sorted(fp8.RECIPES)
LENGTHS = (3, 5, 0, 2)


def members(width=32):
    return [torch.randn(length, width) for length in LENGTHS]


def gradients(layer):
    taken = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    return taken


@pytest.mark.parametrize("recipe", RECIPES)
def test_nested_jagged_is_one_call_of_its_rows(recipe):
    layer, parts = fp8.Linear(32, 32, recipe=recipe), members()
    rows = torch.cat(parts).requires_grad_()
    dense = layer(rows)
    (dense + rows).square().sum().backward()
    expected = gradients(layer)
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape  # the same structure, so x can be added
    (y + x).values().square().sum().backward()
    assert torch.equal(y.values(), dense)
    assert torch.equal(x.grad.values(), rows.grad)
    assert all(map(torch.equal, gradients(layer), expected))


@pytest.mark.parametrize("recipe", RECIPES)
def test_nested_strided_is_one_call_of_its_rows(recipe):
    layer, parts = fp8.Linear(32, 48, recipe=recipe), members()
    rows = torch.cat(parts).requires_grad_()
    dense = layer(rows)
    dense.square().sum().backward()
    expected = gradients(layer)
    x = torch.nested.nested_tensor(parts, layout=torch.strided, requires_grad=True)
    y = layer(x)
    assert [tuple(m.shape) for m in y.unbind()] == [(length, 48) for length in LENGTHS]
    torch.cat(y.unbind()).square().sum().backward()
    assert torch.equal(torch.cat(y.unbind()), dense)
    assert torch.equal(torch.cat(x.grad.unbind()), rows.grad)
    assert all(map(torch.equal, gradients(layer), expected))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", ["layer", "wrapper"])
def test_nested_without_gradients(layout, mode, form):
    layer, parts = fp8.Linear(32, 16), members()
    with mode():
        x = torch.nested.nested_tensor(parts, layout=layout)
        wrapper = lambda x: fp8.ops.fused_linear(x, layer.weight, layer.bias)  # noqa: E731
        y = (layer if form == "layer" else wrapper)(x)
        assert torch.equal(torch.cat(y.unbind()), layer(torch.cat(parts)))


def test_nested_static_scale_and_autocast():
    layer, parts = fp8.Linear(32, 16), members()
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    layer.input_scale = torch.tensor(0.003)
    assert torch.equal(layer(x).values(), layer(torch.cat(parts)))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y.values(), layer(torch.cat(parts)))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_main_grad(layout):
    layer, parts = fp8.Linear(32, 16), members()
    layer(torch.cat(parts)).sum().backward()
    layer.weight.main_grad = torch.zeros(16, 32)
    y = layer(torch.nested.nested_tensor(parts, layout=layout))
    torch.cat(y.unbind()).sum().backward()
    assert torch.equal(layer.weight.main_grad, layer.weight.grad)


def test_nested_dimensions():
    """More of them, ragged elsewhere, and members that differ in several."""
    layer = fp8.Linear(16, 24)
    parts = [torch.randn(length, 4, 16) for length in (2, 3)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert torch.equal(layer(x).values(), layer(torch.cat(parts)))
    transposed = x.transpose(1, 2)
    y = layer(transposed)
    assert y.shape == (2, 4, transposed.shape[2], 24)
    assert torch.equal(y.transpose(1, 2).values(), layer(torch.cat(parts)))
    strided = torch.nested.nested_tensor([torch.randn(2, 5, 16), torch.randn(4, 1, 16)])
    assert [tuple(m.shape) for m in layer(strided).unbind()] == [(2, 5, 24), (4, 1, 24)]
    with pytest.raises(ValueError, match="ragged in another dimension than the last"):
        layer(torch.nested.nested_tensor([torch.randn(2, 16)], layout=torch.jagged).transpose(1, 2))


def test_nested_holes_do_not_enter_scales():
    """What nested.narrow leaves between the members: padding, whatever it holds."""
    padded = torch.full((3, 6, 32), float("nan"))
    for i, length in enumerate((2, 6, 1)):
        padded[i, :length] = torch.randn(length, 32)
    x = torch.nested.narrow(
        padded.requires_grad_(), 1, torch.zeros(3, dtype=torch.int64),
        torch.tensor([2, 6, 1]), layout=torch.jagged,
    )  # fmt: skip
    layer = fp8.Linear(32, 32)
    y = layer(x)
    assert y.shape == x.shape
    rows = torch.cat([padded[i, :length] for i, length in enumerate((2, 6, 1))]).detach()
    assert torch.equal(torch.cat(y.unbind()), layer(rows))


def test_nested_elsewhere_is_refused():
    dense, nested = torch.randn(4, 32), torch.nested.nested_tensor(members(), layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="fp8::fused_linear: expected dense weight"):
        torch.ops.fp8.fused_linear(dense, nested)
    with pytest.raises(NotImplementedError, match="fp8::quantize_rowwise: expected dense tensors"):
        fp8.ops.quantize_rowwise(nested)
    with pytest.raises(NotImplementedError, match="fp8::grouped_linear: expected dense tensors"):
        fp8.ops.grouped_linear(
            torch.nested.nested_tensor(members()), torch.randn(2, 16, 32), torch.tensor([1, 4])
        )
