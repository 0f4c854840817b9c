"""A call of a fused MLP is one node only if nothing is in the way; else the class's own forward."""

from __future__ import annotations

import copy
import functools
import types

import mlp_models as models
import pytest
import torch
from mlp_models import K, assert_same_step, data, fuse, nodes, pair
from reference import assert_same_bits
from torch import nn
from torch.nn import functional as F

import fp8


def test_mlp_main_grad():
    fused, plain = pair(models.Gated())
    for module in (fused, plain):
        module.b.weight.main_grad = torch.zeros(models.FEATURES, K)
    assert_same_step(fused, plain, data(), node=False)
    assert bool(fused.b.weight.main_grad.any())
    assert "b has a main_grad" in fp8.summary(fused)


def test_mlp_global_hooks_see_every_layer():
    fused, _ = pair(models.Gated())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        assert nodes(fused, data()) == 0
    finally:
        handle.remove()
    assert {fused, fused.a, fused.b, fused.c} <= set(seen)
    assert nodes(fused, data()) == 1


def test_mlp_hooks_of_the_module_itself_run():
    fused, _ = pair(models.Gated())
    expected = fused(2 * data()) + 1
    fused.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    fused.register_forward_hook(lambda m, args, y: y + 1)
    assert_same_bits(fused(data()), expected)
    assert nodes(fused, data()) == 1


def test_mlp_dtypes_that_differ():
    """As T5 keeps its last layer in float32: the module casts."""

    class Cast(models.Gated):
        def forward(self, x):
            h = self.act(self.b(x)) * self.a(x)
            return self.c(h.to(self.c.weight.dtype))

    fused, plain = pair(Cast())
    assert_same_step(fused, plain, data(), two=True)
    for module in (fused, plain):
        module.c.float()
    assert_same_step(fused, plain, data(), node=False)
    assert "its layers differ in dtype" in fp8.summary(fused)


class Options(models.Plain):
    """What else a forward may be called with."""

    def forward(self, x, scale=None, **kwargs):
        y = super().forward(x)
        return y if scale is None else y * scale


def test_mlp_calls_of_another_kind():
    fused, plain = pair(Options())
    x = data()
    assert nodes(fused, x) == 1
    for args, kwargs in (
        ((x, 2.0), {}),
        ((x,), {"scale": 2.0}),
        ((x,), {"more": 1}),
        ((), {"x": x}),
    ):
        assert nodes(fused, *args, **kwargs) == 0
        assert_same_bits(fused(*args, **kwargs), plain(*args, **kwargs))


def test_mlp_inputs_of_another_kind():
    class Mine(torch.Tensor):
        pass

    fused, plain = pair(models.Plain())
    nested = torch.nested.nested_tensor([data()[0], data()[1]], layout=torch.jagged)
    for x in (data().as_subclass(Mine), nested):
        assert nodes(fused, x) == 0
    for x in (data(torch.float32), data().double()):
        with pytest.raises(TypeError) as ours:
            fused(x)
        with pytest.raises(TypeError) as theirs:
            plain(x)
        assert str(ours.value) == str(theirs.value)


def test_mlp_forward_replaced_in_the_class(monkeypatch):
    class Mine(models.Gated):
        pass

    fused, _ = pair(Mine())
    monkeypatch.setattr(models.Gated, "forward", lambda self, x: x + 1)
    assert_same_bits(fused(data()), data() + 1)


silu = F.silu


def test_mlp_global_function_replaced(monkeypatch):
    class Globals(models.Gated):
        def forward(self, x):
            return self.c(silu(self.b(x)) * self.a(x))

    fused, plain = pair(Globals())
    assert_same_step(fused, plain, data(), two=True)
    monkeypatch.setitem(globals(), "silu", functools.partial(F.hardtanh, max_val=2.0))
    assert_same_step(fused, plain, data(), node=False)


def test_mlp_attributes_that_it_reads():
    class Scaled(models.Gated):
        multiplier = 1.0

        def __init__(self):
            super().__init__()
            self.config = types.SimpleNamespace(act="silu", rest={"scale": 1.0})

        def forward(self, x):
            act = getattr(F, self.config.act)
            gate = act(self.b(x)) * self.config.rest["scale"]
            return self.c(gate * self.a(x) * self.multiplier)

    fused, plain = pair(Scaled())
    assert_same_step(fused, plain, data(), two=True)
    for module in (fused, plain):
        module.config.rest["scale"] = 2.0
    assert_same_step(fused, plain, data(), node=False)
    for module in (fused, plain):
        module.config = types.SimpleNamespace(act="gelu", rest={"scale": 1.0})
    assert_same_step(fused, plain, data(), two=True)
    for module in (fused, plain):
        module.multiplier = 3.0
    assert_same_step(fused, plain, data(), node=False)


def test_mlp_modes_of_training_are_asked_once(monkeypatch):
    fused, plain = pair(models.Plain())
    assert_same_step(fused.eval(), plain.eval(), data())
    asked = []
    probe = models._fused_mlps.probe
    monkeypatch.setattr(models._fused_mlps, "probe", lambda *a: asked.append(a) or probe(*a))
    for mode in (True, False, True, False):
        assert_same_step(fused.train(mode), plain.train(mode), data())
    assert asked == []
    fused.drop.p = plain.drop.p = 0.5
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert nodes(fused.train(), data()) == 0
    assert len(asked) == 1


def test_mlp_replicas_of_data_parallel():
    """Their weights are tensors, made of the original's parameters."""
    fused, plain = pair(models.Plain())
    replica = fused._replicate_for_data_parallel()
    replica._modules = {n: m._replicate_for_data_parallel() for n, m in fused._modules.items()}
    for name in ("one", "two"):
        layer, own = replica._modules[name], getattr(fused, name)
        layer.weight, layer.bias = (t.detach().clone() for t in (own.weight, own.bias))
    assert nodes(replica, data()) == 0
    assert_same_bits(replica(data()), plain(data()))


def test_mlp_copies_are_apart():
    fused, plain = pair(models.Gated(nn.SiLU()))
    other = copy.deepcopy(fused)
    other.act = nn.Tanh()
    assert nodes(other, data()) == 0
    assert_same_step(fused, plain, data(), two=True)
    assert "- (not fused: it does not compute what it did)" in fp8.summary(other)
    assert nodes(fuse(other), data()) == 0
