"""A sum is fused with its norm only where nothing is in the way of a call; else the class's own
code runs, and the result is right."""

from __future__ import annotations

import pytest
import residual_layers as layers
import torch
from reference import assert_same_bits
from residual_layers import Calls, K, assert_same_step, data, pair, step
from torch import nn
from torch.nn.utils import parametrize

import fp8


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _own_forward(norm):
    forward = norm.forward
    norm.forward = lambda x: forward(x) + 1


def _other_call(norm):
    kind = type(norm)
    call = {"__call__": lambda self, x: kind.__call__(self, 2 * x)}
    norm.__class__ = type("Other", (kind,), call)


WAYS = {
    "hook": lambda norm: norm.register_forward_hook(lambda m, args, y: y * 2),
    "pre-hook": lambda norm: norm.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "backward hook": lambda norm: norm.register_full_backward_hook(
        lambda m, grads, _: tuple(2 * g for g in grads)
    ),
    "backward pre-hook": lambda norm: norm.register_full_backward_pre_hook(
        lambda m, grads: tuple(2 * g for g in grads)
    ),
    "own forward": _own_forward,
    "another call": _other_call,
    "parametrization": lambda norm: parametrize.register_parametrization(norm, "weight", Double()),
    "eps": lambda norm: setattr(norm, "variance_epsilon", 0.5),
    "compiled": lambda norm: setattr(norm, "_compiled_call_impl", lambda x: x + 1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["first", "second"])
def test_norm_that_is_more(monkeypatch, way, name):
    fused, plain = pair(layers.Llamas())
    for module in (fused, plain):
        WAYS[way](getattr(module, name))
    expected = ["add"] if name == "first" else ["join"]
    assert Calls(monkeypatch).during(assert_same_step, fused, plain, data()) == expected
    text = fp8.summary(fused)
    assert "residual, second" in text
    assert f"{name} (not: {name}" in text


def test_hooks_are_called():
    fused, _ = pair(layers.Llamas())
    heard = []
    for name in ("second", "first"):
        norm = getattr(fused, name)
        norm.register_forward_hook(lambda m, args, y: heard.append(m))
    fused.register_forward_hook(lambda m, args, y: heard.append(m))
    fused(data())
    assert heard == [fused.first, fused.second, fused]


def test_hooks_of_all_modules(monkeypatch):
    fused, plain = pair(layers.Llamas())
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: heard.append(m))
    calls = Calls(monkeypatch)
    assert calls.during(fused, data()) == []
    handle.remove()
    assert fused.second in heard
    assert calls.during(assert_same_step, fused, plain, data()) == ["join", "add"]


def test_call_of_the_norms_class(monkeypatch):
    class Mine(layers.Norm):
        def __call__(self, x):
            return super().__call__(2 * x)

    class Layer(layers.Llamas):
        norms = Mine

    fused, plain = pair(Layer())
    assert Calls(monkeypatch).during(assert_same_step, fused, plain, data()) == []


def test_norm_that_is_replaced(monkeypatch):
    fused, plain = pair(layers.Llamas())
    calls = Calls(monkeypatch)
    for module in (fused, plain):
        module.second = nn.Identity()
        del module.first
        module.first = torch.tanh
    assert calls.during(assert_same_step, fused, plain, data()) == []


class Gives(nn.Module):
    """In place of a layer: what its function makes of x."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Subclass(torch.Tensor):
    pass


TERMS = {
    "wider": lambda x: x.float(),
    "broadcast": lambda x: x[:1, :1],
    "number": lambda x: 0.5,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "subclass": lambda x: x.as_subclass(Subclass),
}


@pytest.mark.parametrize("term", TERMS)
def test_terms_of_another_kind(monkeypatch, term):
    fused, plain = pair(layers.Llamas())
    for module in (fused, plain):
        module.mixer = Gives(TERMS[term])
        module.mlp = Gives(torch.sin)
    calls = Calls(monkeypatch)
    y = fused(data())
    assert calls == []
    theirs = plain(data())
    assert (type(y), y.dtype, y.stride()) == (type(theirs), theirs.dtype, theirs.stride())
    assert_same_bits(*(t.detach().as_subclass(torch.Tensor) for t in (y, theirs)), "y")
    assert_same_bits(step(fused, data())["dx"], step(plain, data())["dx"], "dx")


def test_streams_of_another_kind(monkeypatch):
    fused, plain = pair(layers.Llamas())
    calls = Calls(monkeypatch)
    x = data().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert "join" not in calls.during(fused, x)
    assert_same_bits(fused(x), plain(x), "y")
    x = data().as_subclass(Subclass).requires_grad_()
    assert calls.during(fused, x) == []
    wide = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    for module in (fused, plain):
        module.double()
    assert calls.during(fused, wide) == []
    assert_same_bits(fused(wide), plain(wide), "y")


def test_functional_transforms(monkeypatch):
    fused, plain = pair(layers.Llamas(), torch.float32)
    x = data(dtype=torch.float32)
    calls = Calls(monkeypatch)
    ours, theirs = (torch.vmap(m)(x) for m in (fused, plain))
    assert_same_bits(ours, theirs, "vmap")
    grads = [torch.func.grad(lambda t, m=m: m(t).sum())(x) for m in (fused, plain)]
    assert_same_bits(*grads, "grad")
    with torch.autograd.forward_ad.dual_level():
        fused(torch.autograd.forward_ad.make_dual(x, x))
    assert calls == []


def test_layer_norm_under_a_gpus_autocast(monkeypatch):
    """Which casts its input, but not the stream that is added to."""
    fused, _ = pair(layers.Layers())
    calls = Calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls.during(fused, data()) == []
    assert calls.during(fused, data().requires_grad_()) == ["join", "join"]


def test_writes_are_seen():
    """Of the stream that is handed on: as of the stream."""
    norm = fp8.RMSNorm(K)
    x = data(dtype=torch.float32).requires_grad_()
    stream = 1 * x
    y, same = torch.ops.fp8._norm_and_input(stream, norm.weight, None, 1e-6, 0)
    assert same.data_ptr() == stream.data_ptr()
    assert same is not stream
    with torch.no_grad():
        same.mul_(2)
    assert stream._version == same._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
