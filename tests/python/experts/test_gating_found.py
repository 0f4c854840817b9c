"""A gating that reads tensors, draws random numbers or has hooks is its own; whatever the mode and
the defaults of torch, another one is found."""

from __future__ import annotations

import copy

import pytest
import torch
from converted_experts import Swish, call, converted, error, exact, original
from tiny_models import relative
from torch import nn

from fp8.integrations.transformers import _experts as experts

# --- parameters, buffers, and other tensors ---


def parameter(requires_grad):
    return nn.Parameter(torch.ones(()), requires_grad=requires_grad)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("beta", torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


def scaled_by_a_tensor():
    scale = torch.ones(())
    return lambda x: nn.functional.silu(x) * scale


def read_as_a_number():
    beta = torch.ones(())
    return lambda x: x * torch.sigmoid(float(beta) * x)


def read_as_an_array():
    beta = torch.ones(1).numpy()
    return lambda x: x * torch.sigmoid(torch.from_numpy(beta) * x)


@pytest.mark.parametrize(
    "make_activation",
    [
        lambda: Swish(parameter(True)),
        lambda: Swish(parameter(False)),
        Buffered,
        scaled_by_a_tensor,
        read_as_a_number,
        read_as_an_array,
    ],
    ids=["learnable", "frozen", "buffer", "closure", "number", "array"],
)
def test_a_gating_that_reads_a_tensor_is_its_own(make_activation):
    module = converted()
    del module._modules["act_fn"]
    module.act_fn = make_activation()
    assert experts.gate_of(module) is None
    assert error(module) < 0.1


def test_a_learnable_beta_of_one_gets_its_gradient():
    module = converted()
    module.act_fn = Swish(parameter(True))
    module(*call(module)).square().sum().backward()
    ours = module.act_fn.beta.grad.clone()
    module.act_fn.beta.grad = None
    exact(module).square().sum().backward()
    assert relative(ours, module.act_fn.beta.grad) < 0.1


# --- random numbers, hooks, modes ---


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.5])
def test_a_random_gating_is_its_own_while_it_is_random(p):
    module = converted()
    module.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(p))
    module.train()
    state = torch.get_rng_state()
    assert p == 0.0 or experts.gate_of(module) is None
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    module.eval()
    assert experts.gate_of(module).activation == "silu"


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_a_hook_on_the_activation_runs(kind):
    module = converted()
    calls = []
    register = getattr(module.act_fn, f"register_{kind}")
    handle = register(lambda *args: calls.append(args) and None)
    assert experts.gate_of(module) is None
    assert not calls, "a question is no call"
    hidden, *rest = call(module)
    module(hidden.requires_grad_(), *rest).sum().backward()
    assert len(calls) == 1
    handle.remove()
    assert experts.gate_of(module).activation == "silu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gating_is_found_whatever_the_defaults(dtype, device, mode):
    module = copy.deepcopy(original("gpt_oss"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), mode():
            assert experts.gate_of(module).activation == "clamped_silu"
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gating_that_makes_constants_is_found_whatever_the_device(device):
    module = converted()
    del module._modules["act_fn"]
    module.act_fn = lambda x: nn.functional.silu(x) * torch.ones(())
    with torch.device(device):
        assert experts.gate_of(module).activation == "silu"


def test_gating_is_found_within_fake_tensors_and_autocast():
    module = copy.deepcopy(original("mixtral"))
    with torch._subclasses.FakeTensorMode(), torch.autocast("cpu"):
        assert experts.gate_of(module).activation == "silu"
