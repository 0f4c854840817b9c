"""Layers are computed together only where nothing is in the way; else one by one, and right."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import sibling_models as models
import torch
from reference import assert_same_bits
from sibling_models import Attention, K, assert_close_step, convert, data, pair, products
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import fp8


def _hooked(layer):
    layer.register_forward_hook(lambda m, args, y: y * 2)


def _pre_hooked(layer):
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def _backward_hooked(layer):
    layer.register_full_backward_hook(lambda m, grads, _: tuple(g * 2 for g in grads))


def _own_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


OTHERS = ("parametrization", "weight norm")  # is no fp8.Linear then: the others are together
WAYS = {
    "hook": _hooked,
    "pre-hook": _pre_hooked,
    "backward hook": _backward_hooked,
    "own forward": _own_forward,
    "parametrization": lambda layer: parametrize.register_parametrization(
        layer, "weight", Double()
    ),
    "weight norm": weight_norm,
    "main_grad": lambda m: setattr(m.weight, "main_grad", torch.zeros_like(m.weight)),
    "static scale": lambda m: setattr(m, "input_scale", torch.tensor(0.01)),
    "recipe": lambda m: setattr(m, "recipe", "rowwise_gw_hp"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_siblings_of_a_layer_that_is_more(way, name):
    recipe = "tensorwise" if way == "static scale" else "rowwise"
    fused, plain = pair(Attention(), recipe)
    for module in (fused, plain):
        WAYS[way](getattr(module, name))
    assert products(fused, data())[0] == ([2] if way in OTHERS else [])
    if way in OTHERS:
        return assert_close_step(fused, plain, data())
    ours, theirs = models.step(fused, data()), models.step(plain, data())
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert_same_bits(value, theirs[key], key)
    assert "- (not fused: " in fp8.summary(fused)
    return None


def test_siblings_see_what_happens_to_them_later():
    """Whatever is taken off again: they are computed together again."""
    fused, _ = pair(Attention())
    assert products(fused, data()) == ([3], 1)
    handle = fused.b.register_forward_hook(lambda *_: None)
    assert products(fused, data()) == ([], 4)
    handle.remove()
    assert products(fused, data()) == ([3], 1)
    fused.b = nn.Linear(K, K // 2, bias=False).bfloat16()
    assert products(fused, data()) == ([2], 1)
    fused.c = nn.Identity()
    assert [m for m in fused.modules() if isinstance(m, fp8.Linear)] == [fused.a, fused.d]
    fused.attend = lambda q, k, v: q
    fused.c = copy.deepcopy(fused.b)
    assert products(fused, data()) == ([], 1)


@pytest.mark.parametrize("frozen", ["a", "b", "abc", "abcd"])
def test_siblings_frozen(frozen):
    fused, plain = pair(Attention())
    for module in (fused, plain):
        for name in frozen:
            getattr(module, name).weight.requires_grad_(False)
    assert products(fused, data()) == ([3], 1)
    assert_close_step(fused, plain, data())
    assert {n for n in "abcd" if getattr(fused, n).weight.grad is None} == set("abcd")


class Adapter(nn.Module):
    """As PEFT's: the layer is `base_layer`, its output is added to."""

    def __init__(self, base_layer: nn.Module, in_place: bool = False):
        super().__init__()
        self.base_layer = base_layer
        kind = base_layer.weight.dtype
        self.down = nn.Linear(K, 4, bias=False, dtype=kind)
        self.more = nn.Linear(4, base_layer.out_features, bias=False, dtype=kind)
        self.in_place = in_place
        for parameter in base_layer.parameters():
            parameter.requires_grad_(False)

    def forward(self, x):
        y, more = self.base_layer(x), self.more(self.down(x))
        return y.add_(more) if self.in_place else y + more


@pytest.mark.parametrize("names", ["ac", "abc", "b"])
@pytest.mark.parametrize("in_place", [False, True])
def test_siblings_under_adapters(names, in_place):
    """The layers that adapters are put around are computed together still."""
    fused, plain = pair(Attention())
    for module in (fused, plain):
        torch.manual_seed(1)
        for name in names:
            setattr(module, name, Adapter(getattr(module, name), in_place))
    assert products(fused, data()) == ([3], 1)
    assert_close_step(fused, plain, data())
    assert fused.get_submodule(f"{names[0]}.down").weight.grad is None  # of step, which clears


class Scales(Adapter):
    """As IA3's: the layer gets another tensor than the adapter."""

    def forward(self, x):
        return self.base_layer(2 * x)


def test_siblings_under_an_adapter_that_changes_the_input():
    """What was computed for the layer is not taken, and not computed again."""
    fused, plain = pair(Attention())
    for module in (fused, plain):
        module.b = Scales(module.b)
    for merged in ([3], []):
        with torch.no_grad():
            assert products(fused, data())[0] == merged
        assert_same_bits(fused(data()), plain(data()))
    assert "one of a, b, c was not called with the others' input" in fp8.summary(fused)


class Writes(Attention):
    """Modifies its input between two calls, past the code that could be read."""

    def forward(self, x):
        q = self.a(x)
        x.mul_(2)
        return q[..., : K // 2] + self.b(x) + self.c(x)


def test_siblings_of_an_input_that_is_modified():
    fused, plain = pair(Writes())
    with torch.inference_mode():  # whose tensors count no writes
        assert_same_bits(fused(data().clone()), plain(data().clone()))
    x = data()
    with torch.no_grad():
        for _ in range(3):
            assert_same_bits(fused(x.clone()), plain(x.clone()))
    # What was computed and not used is not computed again.
    with torch.no_grad():
        assert products(fused, x.clone()) == ([], 3)
    assert "one of a, b, c was not called with the others' input" in fp8.summary(fused)


class Modes(Attention):
    def forward(self, x):
        q = self.a(x)
        with torch.no_grad():
            k = self.b(x)
        with torch.autocast("cpu", torch.bfloat16):
            v = self.c(x)
        return q[..., : K // 2] + k + v


def test_siblings_in_other_modes():
    """Not found by the code, so said here: the same statements, in one block."""
    fused, plain = pair(Modes())
    ours, theirs = models.step(fused, data()), models.step(plain, data())
    assert not any(name == "b.weight" for name in ours)
    assert ours.keys() == theirs.keys()
    assert_same_bits(ours["y"], theirs["y"])


class Changes(Attention):
    def forward(self, x):
        q = self.a(x)
        self.change()
        return q[..., : K // 2] + self.b(x) + self.c(x)

    def change(self):
        with torch.no_grad():
            self.b.weight.mul_(0)
            self.c.weight = nn.Parameter(torch.zeros_like(self.c.weight))


def test_siblings_whose_weights_change_in_between():
    fused, _ = pair(Changes())
    y = fused(data())
    expected = fp8.ops.fused_linear(data(), fused.a.weight, None, "rowwise")
    assert_same_bits(y, expected[..., : K // 2].contiguous())


class Cached(nn.Module):
    """Cross attention: k and v of the other sequence are kept."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, K) for _ in range(3))
        self.kept = None

    def forward(self, x, other):
        q = self.q(x)
        if self.kept is None:
            self.kept = self.k(other), self.v(other)
        k, v = self.kept
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


def test_siblings_that_are_kept():
    fused, plain = pair(Cached())
    with torch.no_grad():
        assert products(fused, data(), 2 * data()) == ([2], 1)
        assert products(fused, data(), 2 * data()) == ([], 1)
        plain(data(), 2 * data())
        assert_same_bits(fused(data(), 2 * data()), plain(data(), 2 * data()))


class Raises(Attention):
    fails = True

    def forward(self, x):
        y = self.a(x)
        if self.fails:
            raise ArithmeticError
        return y[..., : K // 2] + self.b(x) + self.c(x)


def test_siblings_of_a_forward_that_raises():
    """Nothing is kept of it, and nothing is learned."""
    fused, _ = pair(Attention())
    x = data().requires_grad_()
    alive = []
    fused.attend = lambda q, k, v: (alive.append(weakref.ref(q)), 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fused(x)
    del fused.attend
    gc.collect()
    assert all(ref() is None for ref in alive)
    assert products(fused, data()) == ([3], 1)
    assert fp8.nn._sibling_calls.local.scope is None


class MergedHeads(Attention):
    """As fairseq's: rows and heads in one dimension, which needs outputs of their own."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        batch, tokens = x.shape[:2]
        q = self.a(x).view(batch * tokens * HEADS_OF_K, -1)
        k, v = self.b(x), self.c(x)
        return q.view(batch, tokens, -1)[..., : K // 2] + k + v


HEADS_OF_K = 4


def test_siblings_that_are_viewed_as_columns_cannot_be():
    fused, plain = pair(MergedHeads())
    assert_close_step(fused, plain, data())
    assert fused.calls == 2  # the first time
    assert_close_step(fused, plain, data())
    assert fused.calls == 3
    assert products(fused, data()) == ([3], 0)


def test_siblings_errors_are_the_modules_own():
    fused, plain = pair(Attention())
    for x in (data(dtype=torch.float32), data()[..., :16], data().double()):
        messages = []
        for module in (fused, plain):
            with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
                module(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_siblings_forward_replaced_in_the_class(monkeypatch):
    class Mine(Attention):
        pass

    fused, _ = pair(Mine())
    monkeypatch.setattr(Attention, "forward", lambda self, x: x + 1)
    assert_same_bits(fused(data()), data() + 1)


def test_siblings_forward_of_the_instance():
    module = Attention()
    module.forward = lambda x: x
    convert(module)
    assert not models.is_fused(module)
    fused, _ = pair(Attention())
    fused.forward = lambda x: x
    assert_same_bits(fused(data()), data())
    assert "its forward was replaced on the instance" in fp8.summary(fused)


def test_siblings_inputs_of_another_kind():
    class Mine(torch.Tensor):
        pass

    fused, plain = pair(MergedHeads())
    x = data().as_subclass(Mine)
    assert products(fused, x)[0] == []
    assert type(fused(x)) is type(plain(x))
    torch.testing.assert_close(torch.vmap(fused)(data()[None]), torch.vmap(plain)(data()[None]))
