"""What a gating does besides its values: gradients, settings that it reads, global hooks."""

from __future__ import annotations

import pytest
import torch
from converted_experts import call, converted
from torch import nn

from fp8.integrations.transformers import _experts as experts


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return nn.functional.silu(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.01


def _hooked(x):
    y = nn.functional.silu(x)
    if y.requires_grad:
        y.register_hook(lambda grad: grad * 2)
    return y


OF_ANOTHER_GRADIENT = {
    "detached": lambda x: nn.functional.silu(x).detach(),
    "a part detached": lambda x: (y := nn.functional.silu(x)) * 0.1 + y.detach() * 0.9,
    "a backward of its own": OwnBackward.apply,
    "a hook on the result": _hooked,
    "other values where a gradient is asked for": lambda x: (
        torch.relu(x) if x.requires_grad else nn.functional.silu(x)
    ),
    "zero near zero": lambda x: nn.functional.silu(x) * (x.abs() > 0.1),
}


@pytest.mark.parametrize("activation", OF_ANOTHER_GRADIENT.values(), ids=OF_ANOTHER_GRADIENT)
def test_a_gating_of_equal_values_and_another_gradient_is_its_own(activation):
    module = converted()
    module.act_fn = Calls(activation)
    assert experts.gate_of(module) is None


class Settings:
    mode = 0


def _by_settings(x):
    return nn.functional.silu(x) if Settings.mode == 0 else torch.relu(x)


def test_settings_that_a_gating_reads_are_looked_at(monkeypatch):
    module = converted()
    module.act_fn = Calls(_by_settings)
    assert experts.gate_of(module).activation == "silu"
    monkeypatch.setattr(Settings, "mode", 1)
    assert experts.gate_of(module) is None
    monkeypatch.setattr(Settings, "mode", 0)
    assert experts.gate_of(module).activation == "silu"


def test_a_hook_on_all_modules_runs():
    module = converted()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        module(*call(module))
        assert module.act_fn in seen
    finally:
        handle.remove()
    assert experts.gate_of(module) is not None
