"""Layers whose weight a parent's code takes instead of calling them, in the forms that timm (BEiT,
EVA, SwinV2), torchvision (Swin), transformers (WavLM, T5, BLOOM) and others have."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fp8
from fp8.conversion import _rules as rules

pytestmark = pytest.mark.filterwarnings("ignore:fp8.convert converted nothing")

WIDTH = 16


def every(module, name):
    return True


class Base(nn.Module):
    """Two layers and a little of what forwards look at."""

    def __init__(self, **settings):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        for name, value in settings.items():
            setattr(self, name, value)


class Beit(Base):
    """The bias is put together apart from the weight, unless there is none."""

    def forward(self, x):
        if self.q_bias is None:
            y = self.a(x)
        else:
            bias = torch.cat((self.q_bias, self.q_bias))
            if self.separate:
                y = self.a(x)
                y += bias
            else:
                y = F.linear(x, weight=self.a.weight, bias=bias)
        return self.b(y)


def q_bias():
    return nn.Parameter(torch.zeros(WIDTH // 2))


class Swin(Base):
    def forward(self, x):
        return window_attention(x, self.a.weight, self.b.weight, self.a.bias, self.b.bias)


def window_attention(x, a, b, a_bias, b_bias):
    return F.linear(F.linear(x, a, a_bias), b, b_bias)


class WavLM(Base):
    """In a method, beside keyword arguments; the bias alone of one that nothing calls."""

    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        weight, x = self.a.weight.t(), x + torch.cat((self.b.bias,))
        return x @ weight


class ThroughNames(Base):
    def forward(self, x):
        layer = self.a
        weight = layer.weight

        def product(y):
            return F.linear(y, weight)

        with torch.enable_grad():
            return self.b(product(x))


class InALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x, which=0):
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        return F.linear(x, self.heads[which].weight.data)


class Grandparent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Silent()

    def forward(self, x):
        return F.linear(self.inner(x), self.inner.a.weight)


class Silent(Base):
    def forward(self, x):
        return self.b(x)


class Inherited(Swin):
    def forward(self, x):
        return super().forward(x) + 1


class AProperty(Base):
    @property
    def product(self):
        return self.a.weight @ self.b.weight

    def forward(self, x):
        return x @ self.product


def decorated(forward):
    import functools

    @functools.wraps(forward)
    def wrapper(self, *args):
        return forward(self, *args)

    return wrapper


class Decorated(Swin):
    forward = decorated(Swin.forward)


READ = [
    (lambda: Beit(q_bias=q_bias(), separate=False), {"a": "Beit.forward"}),
    (Swin, {"a": "Swin.forward", "b": "Swin.forward"}),
    (WavLM, {"a": "WavLM.attend", "b": "WavLM.attend"}),
    (ThroughNames, {"a": "ThroughNames.forward"}),
    (
        InALoop,
        {f"{kind}.{i}": "InALoop.forward" for kind in ("layers", "heads") for i in range(2)},
    ),
    (Grandparent, {"inner.a": "Grandparent.forward"}),
    (Inherited, {"a": "Inherited.forward", "b": "Inherited.forward"}),
    (AProperty, {"a": "AProperty.product", "b": "AProperty.product"}),
    (Decorated, {"a": "Decorated.forward", "b": "Decorated.forward"}),
]


@pytest.mark.parametrize(("make", "read"), READ)
def test_a_layer_that_is_read_and_not_called_is_left_alone(make, read):
    torch.manual_seed(0)
    model = make()
    found = {linear.name: linear for linear in rules.find_linears(model)}
    fp8.convert(model, filter=every)
    for name, linear in found.items():
        if name in read:
            reason = f"its weight is used by {read[name]} without calling it"
            assert linear.refused() == reason
            assert type(linear.module) is nn.Linear
        else:
            assert linear.refused() is None
            assert type(linear.module) is fp8.Linear
    assert model(torch.randn(3, WIDTH)).shape == (3, WIDTH)


class Penalized(Base):
    """Called, and its weight is in a loss: what FP8 does not touch."""

    def forward(self, x):
        self.penalty = self.a.weight.square().mean()
        return self.b(self.a(x))


class CalledElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Beit(q_bias=None, separate=False)

    def forward(self, x):
        return F.linear(self.inner(x), self.inner.a.weight)


class InASequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def forward(self, x):
        return self.mlp(x) + self.mlp[0].weight.mean()


@pytest.mark.parametrize(
    ("make", "name", "where"),
    [
        (Penalized, "a", "Penalized.forward"),
        (CalledElsewhere, "inner.a", "CalledElsewhere.forward"),
        (InASequential, "mlp.0", "InASequential.forward"),
    ],
)
def test_a_layer_that_is_read_and_called_is_left_alone_by_default(make, name, where):
    model = make()
    found = {linear.name: linear for linear in rules.find_linears(model)}[name]
    assert found.refused() is None
    assert found.unselected("tensorwise") == f"its weight is used by {where} too, past its forward"
    fp8.convert(model, filter=every)
    assert type(found.module) is fp8.Linear


class AsksAboutIt(Base):
    """T5 and others: the weight's dtype, device, shape, presence, class."""

    def forward(self, x):
        if isinstance(self.a.weight, torch.Tensor) and x.dtype != self.a.weight.dtype:
            x = x.to(self.a.weight.dtype)
        if self.a.bias is not None and self.a.weight is not None:
            x = x.to(self.a.weight)
        weight = self.a.weight
        x = x.view(-1, weight.shape[1]).to(device=weight.device)
        zeros = self.a.weight.new_zeros(WIDTH) + torch.zeros_like(self.a.weight)[0]
        if hasattr(self.a.weight, "CB") or self.a.weight.is_cuda:
            return self.a.weight.quant_state
        if self.a.weight.data.size(0) != len(self.a.weight):
            raise ValueError
        return self.b(self.a(x) + zeros)


class Unused(Base):
    """Reads weights in methods that forward does not reach."""

    def reset(self):
        self.a.weight.data.normal_()
        return self.b.weight @ self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


class Bloom(Base):
    """BLOOM, and Llama in transformers 4.31 to 4.47: slices of weights, if the config says so."""

    def forward(self, x):
        if self.config.pretraining_tp > 1 and self.exact:
            parts = [F.linear(x, self.a.weight[:, i : i + 8]) for i in (0, 8)]
            return sum(parts)
        return self.b(self.a(x))


def bloom(tp):
    return Bloom(config=types.SimpleNamespace(pretraining_tp=tp), exact=True)


class HandedOn(Base):
    """A function that is given the module may call it."""

    def forward(self, x):
        return apply(self.a, apply(self.b.forward, x))


def apply(function, x):
    return function(x)


@pytest.mark.parametrize(
    "make",
    [
        AsksAboutIt,
        Unused,
        lambda: bloom(1),
        HandedOn,
        lambda: Beit(q_bias=None, separate=False),
        lambda: Beit(q_bias=q_bias(), separate=True),
    ],
)
def test_a_layer_that_is_only_called_is_converted(make):
    for linear in rules.find_linears(make()):
        assert linear.reader is None
        assert linear.also_read is None


def test_a_branch_that_the_settings_open_counts():
    found = {linear.name: linear for linear in rules.find_linears(bloom(2))}
    assert found["a"].reader == "its weight is used by Bloom.forward without calling it"


def test_training_rules_no_branch_out():
    class Both(Base):
        def forward(self, x):
            if self.training:
                return self.a(x)
            return F.linear(x, self.a.weight)

    found = {linear.name: linear for linear in rules.find_linears(Both().train())}
    assert found["a"].also_read == "Both.forward"


@pytest.mark.parametrize("forward", [None, len, lambda: 0, types.SimpleNamespace()])
def test_a_forward_that_is_no_method_is_no_obstacle(forward):
    model = type("Odd", (Base,), {"forward": forward})()
    assert [linear.reader for linear in rules.find_linears(model)] == [None, None]


def test_summary_says_who_reads_a_weight():
    lines = fp8.summary(Swin()).splitlines()
    assert lines[1].endswith("- (its weight is used by Swin.forward without calling it)")
