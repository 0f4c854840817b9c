"""What happens to fused norms after fp8.convert: patches, hooks, copies, reverts."""

from __future__ import annotations

import abc
import copy
import pickle

import pytest
import torch
from fused_norms import WIDTH, fuse, is_fused
from reference import assert_same_bits
from torch import nn
from torch.nn.utils import parametrize

import fp8


class Norm(nn.Module):
    eps = 1e-6

    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def hat(self, x):
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return (self.weight * self.hat(x)).to(x.dtype)


@pytest.fixture
def kind():
    class Mine(Norm):
        def forward(self, x):
            return super().forward(x)

    return Mine


def twice(*args):
    return 2 * args[-1]


@pytest.mark.parametrize("name", ["hat", "forward"])
@pytest.mark.parametrize("where", ["class", "base", "instance"])
def test_what_the_forward_calls_may_be_replaced(monkeypatch, kind, name, where):
    module = fuse(kind())
    x = torch.randn(3, WIDTH)
    if where == "base" or (where, name) == ("class", "hat"):
        monkeypatch.setattr(Norm if where == "base" else kind, name, twice, raising=False)
    elif where == "class":
        monkeypatch.setattr(kind, name, twice)
    else:
        setattr(module, name, twice)
    torch.testing.assert_close(module(x), 2 * x * (module.weight if name == "hat" else 1))
    if where != "instance":
        assert "- (not fused: its class's forward was replaced)" in fp8.summary(module)


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_constant_of_the_class_may_change(monkeypatch, kind, where):
    module = fuse(kind())
    assert is_fused(module)
    x = torch.randn(3, WIDTH)
    expected = module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1)
    if where == "class":
        monkeypatch.setattr(Norm, "eps", 1.0)
    else:
        module.eps = 1.0
    torch.testing.assert_close(module(x), expected)


def test_a_forward_that_comes_and_goes(monkeypatch, kind):
    fuse(kind())
    x = 1e-3 * torch.randn(3, WIDTH)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "eps", 1e-5, raising=False)
        patch.setattr(kind, "forward", lambda self, x: (self.weight * self.hat(x)).to(x.dtype))
        module = fuse(kind())
        assert is_fused(module)
    torch.testing.assert_close(
        module(x), module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    )


def test_a_module_of_a_fused_class_that_nobody_converted():
    module = type(fuse(nn.Sequential(Norm()))[0])(WIDTH)
    x = torch.randn(3, WIDTH)
    assert torch.equal(module(x), Norm.forward(module, x))
    assert "- (not fused: made of a fused class; convert again)" in fp8.summary(module)
    fuse(module)
    assert fp8.summary(module).endswith("1 norms fused")
    assert type(fp8.revert(module)) is Norm


def test_a_forward_that_was_kept_outlives_a_revert():
    """As hooks of accelerate keep it, and leave it on the instance."""
    module = fuse(Norm())
    x = torch.randn(3, WIDTH)
    kept = module.forward
    module.forward = lambda x: kept(x)
    fp8.revert(module)
    assert torch.equal(module(x), Norm.forward(module, x))
    del module.forward
    fuse(module)
    module.forward = module.forward
    fp8.revert(module)
    assert "forward" not in vars(module)
    assert type(module) is Norm


def test_classes_that_look_at_their_subclasses():
    register = {}

    class Named(Norm):
        def __init_subclass__(cls, *, name):
            super().__init_subclass__()
            register[name] = cls

    class Mine(Named, abc.ABC, name="mine"):
        pass

    class Final(Norm):
        def __init_subclass__(cls):
            raise TypeError("final")

    for module in (Mine(), Final()):
        assert is_fused(fuse(module))
        assert isinstance(module, (Mine, Final))
        torch.testing.assert_close(module(torch.ones(2, WIDTH)), module.weight.expand(2, WIDTH))
        fp8.revert(module)
    assert register == {"mine": Mine}


class Meta(type):
    def __new__(mcs, name, bases, body):
        if any(isinstance(base, Meta) for base in bases):
            raise TypeError("no subclasses")
        return super().__new__(mcs, name, bases, body)


def test_a_class_that_takes_no_subclass_is_left_alone():
    class Sealed(Norm, metaclass=Meta):
        pass

    module = nn.Sequential(Sealed(), Norm())
    fuse(module)
    assert [is_fused(m) for m in module] == [False, True]
    assert "its class takes no subclass: no subclasses" in fp8.summary(module)


class Reduced(Norm):
    def __reduce__(self):
        return type(self), (WIDTH,), vars(self)


def test_a_reduce_of_the_class():
    module = fuse(Reduced())
    x = torch.randn(3, WIDTH)
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        torch.testing.assert_close(copied(x), module(x))


def test_a_parametrization_runs_once():
    class Counting(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight * self.calls

    module = fuse(nn.LayerNorm(WIDTH))
    counting = Counting()
    parametrize.register_parametrization(module, "weight", counting)
    before = counting.calls
    module(torch.randn(3, WIDTH))
    assert counting.calls == before + 1


@pytest.mark.parametrize("shape", [(2, 5, 3, WIDTH), (4, 1, 7, WIDTH), (2, 3, 4, 5, WIDTH)])
def test_y_lies_as_eager_code_leaves_it(shape):
    eager, module = Norm(), fuse(Norm())
    module.load_state_dict(eager.state_dict())
    x = torch.randn(shape)
    for swapped in (x.transpose(1, 2), x.transpose(0, 1), x[:, ::2], x.transpose(-1, -2)):
        if swapped.shape[-1] == WIDTH:
            y, expected = module(swapped), eager(swapped)
            sizes = [i for i in range(x.dim()) if swapped.shape[i] > 1]
            assert [y.stride(i) for i in sizes] == [expected.stride(i) for i in sizes]
            torch.testing.assert_close(y, expected)
    y = module(x.transpose(1, 2)).transpose(1, 2)
    assert_same_bits(y.reshape(-1, WIDTH), module(x.reshape(-1, WIDTH)), "rows")
    torch.compile(
        lambda x: module(x.transpose(1, 2)).transpose(1, 2).view(-1),
        backend="eager",
        fullgraph=True,
    )(x)


def test_transforms_of_torch_func():
    eager, module = Norm(), fuse(Norm())
    module.load_state_dict(eager.state_dict())
    x, t = torch.randn(2, 3, WIDTH)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        results = [transform(lambda x, m=m: m(x).square().sum())(x) for m in (module, eager)]
        torch.testing.assert_close(*results)
    results = [torch.func.jvp(m, (x,), (t,)) for m in (module, eager)]
    torch.testing.assert_close(*results)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        results = [torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (module, eager)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["bias", "mask", "child"])
def test_what_a_norm_is_given_later_counts(name):
    class More(nn.LayerNorm):
        def __init__(self):
            super().__init__(WIDTH, bias=False)
            self.register_buffer("mask", None)

        def forward(self, x):
            y = super().forward(x)
            y = y if self.mask is None else y * self.mask
            return [y, *(child(y) for child in self.children())][-1]

    module = fuse(More())
    x = torch.randn(3, WIDTH)
    assert is_fused(module)
    setattr(module, name, nn.Parameter(torch.ones(WIDTH)) if name == "bias" else None)
    if name == "mask":
        module.mask = torch.zeros(WIDTH)
    elif name == "child":
        module.child = nn.Linear(WIDTH, WIDTH)
    assert torch.equal(module(x), More.forward(module, x))
    assert "- (not fused: it has" in fp8.summary(module)


def test_a_forward_that_looks_for_what_may_come_is_left_alone():
    class Looking(Norm):
        def forward(self, x):
            return super().forward(x) * getattr(self, "scale", 1.0)

    assert not is_fused(fuse(Looking()))
