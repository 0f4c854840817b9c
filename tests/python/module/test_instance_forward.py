"""A `forward` on the instance: another one is respected; the class's own, which accelerate leaves
behind when it takes its hook off, is nothing."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import fp8

EVERY = {"filter": lambda module, name: True}


def with_hook_taken_off(module):
    """What accelerate's add_hook_to_module and remove_hook_from_module do."""
    old = module.forward
    module.forward = lambda x: old(x)
    module.forward = old
    assert "forward" in vars(module)
    return module


def test_convert_takes_a_layer_whose_hook_was_taken_off():
    model = nn.Sequential(with_hook_taken_off(nn.Linear(32, 16)), nn.Linear(16, 8))
    plain = [nn.Linear(32, 16), nn.Linear(16, 8)]
    for layer, copied in zip(model, plain, strict=True):
        copied.load_state_dict(layer.state_dict())
    fp8.convert(model, **EVERY)
    assert all(type(layer) is fp8.Linear for layer in model)
    x = torch.randn(4, 32)
    assert torch.equal(model(x), fp8.convert(nn.Sequential(*plain), **EVERY)(x))
    assert not torch.equal(model(x), torch.nn.functional.linear(model[0](x), model[1].weight))


@pytest.mark.parametrize("where", ["before", "after"])
def test_revert_gives_nn_linear_back(where):
    layer = nn.Linear(32, 16)
    model = nn.Sequential(layer)
    if where == "before":
        with_hook_taken_off(layer)
    fp8.convert(model, **EVERY)
    if where == "after":
        with_hook_taken_off(layer)
    fp8.revert(model)
    assert type(layer) is nn.Linear
    x = torch.randn(4, 32)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert type(pickle.loads(pickle.dumps(layer))) is nn.Linear


def test_from_linear_leaves_the_forward_of_the_other_module_behind():
    linear = with_hook_taken_off(nn.Linear(32, 16))
    layer = fp8.Linear.from_linear(linear)
    assert "forward" not in vars(layer)
    x = torch.randn(4, 32)
    assert torch.equal(layer(x), torch.ops.fp8.fused_linear(x, layer.weight, layer.bias))


def test_a_forward_of_another_module_or_function_is_respected():
    for forward in (nn.Linear(32, 16).forward, lambda x: x, nn.Identity().forward):
        model = nn.Sequential(nn.Linear(32, 16))
        model[0].forward = forward
        with pytest.warns(UserWarning, match="converted nothing"):
            fp8.convert(model, **EVERY)
        assert type(model[0]) is nn.Linear
        with pytest.raises(TypeError, match="forward was replaced"):
            fp8.Linear.from_linear(model[0])


def test_layers_converted_later_are_not_called_idle():
    """What ran before a conversion says nothing of the layers that it adds."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    fp8.convert(model, filter=lambda module, name: name == "1")
    x = torch.randn(4, 32)
    model(x)
    fp8.convert(model, **EVERY)
    assert "never called" not in fp8.summary(model)
    model[0](x)
    with pytest.warns(UserWarning, match="never called"):
        assert "never called" in fp8.summary(model)
