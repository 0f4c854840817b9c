"""fp8.Linear.from_linear: another view of the same parameters."""

import pytest
import torch
from torch import nn

import fp8


def test_from_linear_shares_the_parameters():
    linear = nn.Linear(64, 48)
    layer = fp8.Linear.from_linear(linear, recipe="rowwise")
    assert (type(layer), layer.recipe) == (fp8.Linear, "rowwise")
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (64, 48)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), fp8.ops.fused_linear(x, linear.weight, linear.bias, "rowwise"))


def test_from_linear_leaves_the_original_alone():
    linear = nn.Linear(64, 48)
    x = torch.randn(3, 64)
    expected = linear(x)
    layer = fp8.Linear.from_linear(linear)
    layer.register_forward_hook(lambda module, args, output: output * 0)
    layer.extra = nn.Parameter(torch.ones(1))
    layer.weight = nn.Parameter(torch.ones(48, 64))
    assert type(linear) is nn.Linear
    assert not hasattr(linear, "recipe")
    assert torch.equal(linear(x), expected)
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_from_linear_without_bias_or_gradient():
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    layer = fp8.Linear.from_linear(linear)
    assert layer.bias is None
    assert not layer(torch.randn(3, 64)).requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_keeps_training_flag_hooks_and_attributes(training):
    linear = nn.Linear(64, 48).train(training)
    calls = []
    linear.register_forward_pre_hook(lambda *_: calls.append("pre"))
    linear.register_forward_hook(lambda *_: calls.append("post"))
    linear.register_full_backward_hook(lambda *_: calls.append("backward"))
    linear.register_buffer("steps", torch.zeros(1))
    linear.note = "mine"
    layer = fp8.Linear.from_linear(linear)
    assert layer.training is training
    assert layer.steps is linear.steps
    assert layer.note == "mine"
    layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert calls == ["pre", "post", "backward"]


def test_from_linear_of_an_fp8_linear_changes_the_recipe():
    layer = fp8.Linear(64, 48)
    other = fp8.Linear.from_linear(layer, recipe="rowwise")
    assert (layer.recipe, other.recipe) == ("tensorwise", "rowwise")
    assert other.weight is layer.weight


def test_from_linear_makes_the_class_it_is_called_on():
    class Mine(fp8.Linear):
        pass

    assert type(Mine.from_linear(nn.Linear(16, 16))) is Mine


def test_from_linear_of_a_compiled_module_does_not_run_the_original():
    linear = nn.Linear(64, 48)
    linear.compile(backend="eager")
    layer = fp8.Linear.from_linear(linear)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), fp8.ops.fused_linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (nn.LazyLinear(16), "LazyLinear"),
        (nn.MultiheadAttention(16, 2).out_proj, "NonDynamicallyQuantizableLinear"),
        (nn.Conv1d(4, 4, 1), "Conv1d"),
        (torch.ones(2, 2), "Tensor"),
    ],
)
def test_from_linear_refuses_other_classes(value, name):
    with pytest.raises(TypeError, match=f"expected an nn.Linear itself, no subclass, got {name}"):
        fp8.Linear.from_linear(value)


def test_from_linear_refuses_a_replaced_forward():
    linear = nn.Linear(16, 16)
    linear.forward = lambda x: x
    with pytest.raises(TypeError, match="forward was replaced on this instance"):
        fp8.Linear.from_linear(linear)


def test_from_linear_refuses_an_unknown_recipe():
    with pytest.raises(
        ValueError, match=r"expected a recipe out of 'tensorwise', 'rowwise', .*, got 'colwise'"
    ):
        fp8.Linear.from_linear(nn.Linear(16, 16), recipe="colwise")
