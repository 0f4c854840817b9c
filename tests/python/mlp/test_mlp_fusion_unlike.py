"""What is nearly an MLP is left alone by fp8.convert, and is as it was."""

from __future__ import annotations

import copy

import mlp_models as models
import pytest
import torch
from mlp_models import FEATURES, K, fuse, is_fused
from torch import nn
from torch.nn import functional as F

import fp8


class Wrong:
    class Dropped(models.Plain):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.1)

    class DroppedAtTheEnd(models.Gated):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    class Multiplied(models.Gated):
        def forward(self, hidden_states):
            gate = self.act(0.5 * self.b(hidden_states))
            return self.c(gate * self.a(hidden_states))

    class MultipliedAtTheEnd(models.Gated):
        def forward(self, x):
            return super().forward(x) * 2

    class MultipliedInPlace(models.Gated):
        def forward(self, x):
            return super().forward(x).mul_(2)

    class InputInPlace(models.Plain):
        def forward(self, x):
            return super().forward(x.mul_(2))

    class InputInPlaceAfter(models.Plain):
        def forward(self, x):
            y = super().forward(x)
            x.zero_()
            return y

    class Normed(models.Gated):
        def forward(self, x):
            return self.c(F.rms_norm(self.act(self.b(x)) * self.a(x), (FEATURES,)))

    class NormedByAModule(models.Gated):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(FEATURES)

        def forward(self, x):
            return self.c(self.norm(self.act(self.b(x)) * self.a(x)))

    class OtherInputs(models.Gated):
        def forward(self, x):
            return self.c(self.act(self.b(x)) * self.a(x + 1))

    class OtherObject(models.Gated):
        def forward(self, x):
            return self.c(self.act(self.b(x)) * self.a(x.clone()))

    class Residual(models.Gated):
        def forward(self, x):
            return x + super().forward(x)

    class Gate(models.Gated):
        """The other way round: an activation of what is gated, too."""

        def forward(self, x):
            return self.c(self.act(self.b(x)) * self.act(self.a(x)))

    class Clipped(models.Gated):
        def forward(self, x):
            return self.c((self.act(self.b(x)) * self.a(x)).clamp(-60000, 60000))

    class Detached(models.Gated):
        def forward(self, x):
            return self.c(self.act(self.b(x)).detach() * self.a(x))

    class Straight(models.Gated):
        """The values of an activation, and another gradient."""

        def forward(self, x):
            b = self.b(x)
            gate = b + (self.act(b) - b).detach()
            return self.c((gate - gate.detach() + self.act(b).detach()) * self.a(x))

    class InTrainingOnly(models.Gated):
        def forward(self, x):
            h = self.act(self.b(x)) * self.a(x)
            return self.c(h if self.training else 2 * h)

    class WithoutGradientsOnly(models.Gated):
        def forward(self, x):
            h = self.act(self.b(x)) * self.a(x)
            return self.c(2 * h if torch.is_grad_enabled() else h)

    class Tuple(models.Gated):
        def forward(self, x):
            return super().forward(x), None

    class Counting(models.Gated):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    class Noting(models.Gated):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(1)
            return super().forward(x)

    class Twice(models.Plain):
        def forward(self, x):
            self.one(x)
            return super().forward(x)

    class WeightRead(models.Plain):
        def forward(self, x):
            return self.two(F.gelu(F.linear(x, self.one.weight, self.one.bias)))

    class Scaled(models.Gated):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(FEATURES))

        def forward(self, x):
            return self.c(self.act(self.b(x)) * self.a(x) * self.scale)

    class Interleaved(models.Merged):
        def forward(self, x):
            both = self.both(x)
            return self.out(F.silu(both[..., ::2]) * both[..., 1::2])

    class TwoInputs(models.Plain):
        def forward(self, x, y):
            return super().forward(x + y)


@pytest.mark.parametrize("name", [n for n in vars(Wrong) if not n.startswith("_")])
def test_mlp_unlike_is_left_alone(name):
    module = getattr(Wrong, name)()
    random, attributes = torch.get_rng_state(), copy.deepcopy(vars(module))
    fuse(module)
    assert not is_fused(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert vars(module).keys() == attributes.keys()
    assert getattr(module, "seen", []) == []
    assert getattr(module, "calls", 0) == 0


class Learned(nn.Module):
    """silu(1 · x): a parameter that says so for now."""

    def __init__(self, requires_grad: bool = True):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()), requires_grad)

    def forward(self, x):
        return F.silu(self.beta * x)


class Closed:
    """The same, where nobody looks."""

    def __init__(self):
        self.beta = [torch.ones((), requires_grad=True)]

    def __call__(self, x):
        return F.silu(self.beta[0] * x)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x * torch.sigmoid(1.702 * x),  # quick_gelu
        torch.sigmoid,
        torch.tanh,
        F.elu,
        F.relu6,
        lambda x: x,
        lambda x: x.clamp(min=0),  # not relu: its gradient at 0 is another
        Learned(),
        Learned(requires_grad=False),
        nn.PReLU(init=0.0),
        Closed(),
    ],
)
@pytest.mark.parametrize("form", [models.Gated, models.Plain])
def test_mlp_activation_outside_the_list(form, act):
    assert not is_fused(fuse(form(act)))


def test_mlp_activation_that_rounds_otherwise_is_of_other_dtypes():
    """F.silu in float32, rounded at the end: another h than T(silu) · up in bfloat16."""

    class Wide(models.Gated):
        def forward(self, x):
            return self.c((F.silu(self.b(x).float()) * self.a(x).float()).type_as(x))

    for dtype, node in ((torch.bfloat16, False), (torch.float32, True)):
        fused, plain = models.pair(Wide(), dtype=dtype)
        models.assert_same_step(fused, plain, models.data(dtype), node=node, two=True)


def test_mlp_other_modules_are_left_alone():
    for module in (
        nn.Sequential(nn.Linear(K, K), nn.Linear(K, K)),
        nn.Sequential(nn.Linear(K, K), nn.GELU(), nn.Linear(K, K), nn.GELU(), nn.Linear(K, K)),
        nn.ModuleList([nn.Linear(K, K), nn.Linear(K, K)]),
        nn.Sequential(nn.Linear(K, 2 * K), nn.GLU(), nn.Linear(K, K)),
        nn.TransformerEncoderLayer(K, 2, K),
    ):
        kind = type(module)
        assert type(fuse(module)) is kind


def test_mlp_sizes_that_do_not_meet():
    class Broadcast(models.Gated):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(K, 1, bias=False)

    assert not is_fused(fuse(Broadcast()))


def test_mlp_forward_on_the_instance_rules():
    module = models.Gated()
    module.forward = lambda x: x + 1
    assert not is_fused(fuse(module))
    model = nn.Sequential(fuse(models.Gated()), module)
    assert "its forward was replaced on the instance" in fp8.summary(model)
    late = fuse(models.Gated())
    late.forward = lambda x: x + 1
    assert torch.equal(late(torch.zeros(2, K)), torch.ones(2, K))
