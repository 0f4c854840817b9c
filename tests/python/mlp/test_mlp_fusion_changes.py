"""What happens to a fused MLP, its layers or its activation later is seen in the next call."""

from __future__ import annotations

import types

import mlp_models as models
import pytest
import torch
from mlp_models import K, assert_same_step, data, nodes, pair
from reference import assert_same_bits
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import fp8


def hook(module):
    module.a.register_forward_hook(lambda m, args, output: output * 2)


def pre_hook(module):
    module.c.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def backward_hook(module):
    module.b.register_full_backward_hook(lambda m, grads, outs: (grads[0] * 2,))


def backward_pre_hook(module):
    module.b.register_full_backward_pre_hook(lambda m, grads: (grads[0] * 2,))


def own_forward(module):
    layer = module.b
    layer.forward = lambda x: F.linear(x, layer.weight) * 2


def wrapper(module):
    module.a = nn.Sequential(module.a, nn.Tanh())


def adapter(module):
    """As PEFT wraps a layer."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.delta = nn.Linear(K, models.FEATURES, bias=False, dtype=torch.bfloat16)

        def forward(self, x):
            return self.base_layer(x) + self.delta(x)

    torch.manual_seed(2)
    module.b = Adapted(module.b)


def subclass(module):
    class Mine(fp8.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    module.c.__class__ = Mine


def reverted(module):
    fp8.revert(module.a)


def parametrization(module):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module.a, "weight", Doubled())


def tensor_subclass(module):
    class Mine(torch.Tensor):
        pass

    module.a._parameters["weight"] = module.a.weight.detach().as_subclass(Mine)


def tensor_bias(module):
    layer = module.a
    del layer.bias
    layer.bias = torch.ones(models.FEATURES, dtype=torch.bfloat16)


def other_shape(module):
    """up is one number a row, which is broadcast."""
    module.a.weight = nn.Parameter(module.a.weight.detach()[:1].clone())


def other_recipe(module):
    module.a.recipe = "rowwise"


def static_scale(module):
    module.b.input_scale = torch.tensor(0.01)


def activation(module):
    module.act = nn.Tanh()


def activation_in_the_list(module):
    module.act = nn.GELU()


def activation_attribute(module):
    module.act.approximate = "tanh"


def activation_forward(module):
    module.act.forward = lambda x: 3 * F.silu(x)


def activation_hook(module):
    module.act.register_forward_hook(lambda m, args, output: output * 2)


def learned_activation(module):
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.beta = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x):
            return F.silu(self.beta * x)

    module.act = Learned()


def swapped(module):
    module.a, module.b = module.b, module.a


def own_method(module):
    def forward(self, x):
        return models.Gated.forward(self, x) * 2

    module.forward = types.MethodType(forward, module)


CHANGES = {  # whether the call is one node after it
    hook: False,
    pre_hook: False,
    backward_hook: False,
    backward_pre_hook: False,
    own_forward: False,
    wrapper: False,
    adapter: False,
    subclass: False,
    reverted: False,
    parametrization: False,
    tensor_subclass: False,
    tensor_bias: False,
    other_shape: False,
    other_recipe: False,
    static_scale: False,
    activation: False,
    activation_in_the_list: True,
    activation_forward: False,
    activation_hook: False,
    activation_attribute: True,
    learned_activation: False,
    swapped: True,
    own_method: False,
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_mlp_changes_are_seen(change):
    act = nn.GELU() if change is activation_attribute else nn.SiLU()
    fused, plain = pair(models.Gated(act))
    assert_same_step(fused, plain, data(), two=True)
    for module in (fused, plain):
        change(module)
    (y, grads), (expected, theirs) = (models.step(module, data()) for module in (fused, plain))
    assert_same_bits(y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), "y")
    assert grads.keys() == theirs.keys()
    if not CHANGES[change]:
        for name, grad in grads.items():
            assert_same_bits(*(g.as_subclass(torch.Tensor) for g in (grad, theirs[name])), name)
    assert nodes(fused, data()) == int(CHANGES[change])
    if change is not own_method:
        assert ("fused: mlp" in fp8.summary(fused)) == CHANGES[change]
