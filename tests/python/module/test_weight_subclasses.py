"""Weights that another library turned into subclasses of Tensor: an error that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

import fp8

DETACH = torch.ops.aten.detach.default


class Quantized(torch.Tensor):
    """A weight in 8 bits that F.linear knows, as torchao's."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data):
        self.codes = (data * 100).to(torch.int8)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.codes.float() / 100, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is DETACH:
            new = cls.__new__(cls, args[0].codes)
            new.codes = args[0].codes
            return return_and_correct_aliasing(func, args, kwargs or {}, new)
        return cls.other(func)

    @classmethod
    def other(cls, func):
        raise NotImplementedError(f"{cls.__name__} dispatch: unimplemented {func}")


class Silent(Quantized):
    """Its dispatch says so by NotImplemented, which PyTorch makes a TypeError of."""

    @classmethod
    def other(cls, func):
        return NotImplemented


class Packed(nn.Parameter):
    """Packed codes in a Parameter of one's own, as bitsandbytes' Params4bit."""


def packed(weight):
    return Packed(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


WEIGHTS = {
    "raises": lambda weight: nn.Parameter(Quantized(weight), requires_grad=False),
    "not implemented": lambda weight: nn.Parameter(Silent(weight), requires_grad=False),
    "packed": packed,
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weight_of_another_library_is_refused(kind, mode):
    model = nn.Sequential(fp8.Linear(32, 16))
    model[0].weight = WEIGHTS[kind](model[0].weight.detach())
    name = type(model[0].weight).__qualname__
    with (
        mode(),
        pytest.raises(TypeError, match=rf"fp8.Linear: .* got .*{name} .*fp8.revert\(model\) first"),
    ):
        model(torch.randn(4, 32))


def test_weight_of_another_library_works_after_revert():
    model = nn.Sequential(fp8.Linear(32, 16))
    model[0].weight = WEIGHTS["raises"](model[0].weight.detach())
    x = torch.randn(4, 32)
    y = fp8.revert(model)(x)
    assert torch.equal(y, x @ (model[0].weight.codes.float() / 100).t() + model[0].bias)


def test_subclass_of_parameter_that_only_adds():
    class Named(nn.Parameter):
        pass

    layer = fp8.Linear(32, 16)
    layer.weight = Named(layer.weight.detach())
    x = torch.randn(4, 32)
    y = layer(x)
    assert torch.equal(y, fp8.ops.fused_linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert layer.weight.grad is not None
    with pytest.raises(TypeError, match=r"expected x in bfloat16, float16 or float32, got float64"):
        layer(x.double())
