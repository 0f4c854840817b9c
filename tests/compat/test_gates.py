"""Experts whose gating changes after the conversion, or only looks like one that is known.

Each case is compared with transformers' own loop over the experts, forward and backward, which
calls whatever the module has now.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from converted import convert, relative
from tiny_transformers import MIXTURES, make
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import batched_mm_experts_forward

import fp8

FORWARD, BACKWARD = 0.15, 0.25
WRONG = 0.02  # of fp8 itself: less would mean that FP8 did not run


class Swish(nn.Module):
    """x · sigmoid(beta x): with beta = 1 the values of SiLU, and a parameter that learns."""

    def __init__(self, beta: float = 1.0, learn: bool = True) -> None:
        super().__init__()
        value = torch.tensor(beta)
        if learn:
            self.beta = nn.Parameter(value)
        else:
            self.register_buffer("beta", value)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Counted(nn.Module):
    """SiLU with a side effect."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.silu(x)


def experts(family: str = "mixtral", before: Any = None) -> nn.Module:
    """The experts module of a converted model, which runs once before the test changes it."""
    model = make(family)
    module = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    if before is not None:
        before(module)
    convert(model)
    assert fp8.integrations.transformers.in_fp8(module)
    forward(module, *routed())
    return module


def routed() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(48, 32, generator=generator)
    values, index = torch.randn(48, 4, generator=generator).topk(2)
    return x, index, values.softmax(-1)


def forward(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return module(x, index, weights)


def run(module: nn.Module, exact: Any = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """y, the gradient of x and those of the parameters, of the module or of another function."""
    x, index, weights = routed()
    x.requires_grad_()
    module.zero_grad()
    torch.manual_seed(1)
    y = (exact or forward)(module, x, index, weights)
    y.square().mean().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in module.named_parameters()}


def eager(module: nn.Module, *args: Tensor) -> Tensor:
    """transformers' loop over the experts, which calls act_fn and not always _apply_gate."""
    return type(module).forward.__wrapped__(module, *args)


def assert_as_eager(module: nn.Module, reference: Any = eager) -> None:
    y, dx, grads = run(module)
    exact_y, exact_dx, exact = run(copy.deepcopy(module), reference)
    assert WRONG < relative(y, exact_y) < FORWARD
    assert relative(dx, exact_dx) < BACKWARD
    for name, grad in exact.items():
        if grad is not None:
            assert grads[name] is not None, name
            assert relative(grads[name], grad) < BACKWARD, name


SWIGLU = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("family", MIXTURES)
def test_untouched(family):
    assert_as_eager(experts(family))


@pytest.mark.parametrize("family", SWIGLU)
@pytest.mark.parametrize(
    "new",
    [nn.ReLU(), F.relu, nn.Tanh(), nn.GELU(), nn.Identity(), F.silu, nn.PReLU()],
    ids=lambda new: getattr(new, "__name__", type(new).__name__),
)
def test_act_fn_replaced_after_conversion(family, new):
    module = experts(family)
    if isinstance(new, nn.Module):
        module.act_fn = copy.deepcopy(new)
    else:
        del module.act_fn
        module.act_fn = new
    assert_as_eager(module)


@pytest.mark.parametrize("family", SWIGLU)
@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_swish_with_a_beta_of_its_own(family, learn, when):
    def change(module):
        module.act_fn = Swish(learn=learn)

    module = experts(family, change if when == "before" else None)
    if when == "after":
        change(module)
    assert_as_eager(module)
    with torch.no_grad():
        module.act_fn.beta.fill_(2.5)  # as an optimizer does
    assert_as_eager(module)
    module.act_fn.beta.data = torch.tensor(0.5)
    assert_as_eager(module)


@pytest.mark.parametrize("family", SWIGLU)
def test_a_learnable_beta_learns(family):
    module = experts(family, lambda m: setattr(m, "act_fn", Swish()))
    run(module)
    assert module.act_fn.beta.grad is not None
    assert float(module.act_fn.beta.grad.abs()) > 0


def test_act_fn_with_dropout_is_random_in_training_only():
    """Found in eval mode, where dropout does nothing, and used in training."""
    model = make("mixtral").eval()
    modules = [m for n, m in model.named_modules() if n.endswith(".experts")]
    for module in modules:
        module.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    model.eval()
    convert(model)
    module = modules[0]
    assert_as_eager(module)
    module.train()
    x, index, weights = routed()
    with torch.no_grad():
        torch.manual_seed(1)
        one = module(x, index, weights)
        torch.manual_seed(2)
        other = module(x, index, weights)
    assert relative(one, other) > 0.3


def test_conversion_draws_no_random_numbers():
    model = make("mixtral")
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    before = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["pre", "post", "backward"])
def test_hooks_on_act_fn_are_called(kind):
    """What a hook changes counts; what it only looks at, it sees."""
    module = experts()
    seen = []
    if kind == "pre":
        module.act_fn.register_forward_pre_hook(lambda m, args: seen.append(1) or (args[0] * 2,))
    elif kind == "post":
        module.act_fn.register_forward_hook(lambda m, args, y: seen.append(1) or y * 0.5)
    else:
        module.act_fn.register_full_backward_hook(lambda m, gi, go: seen.append(1))
    assert_as_eager(module)
    assert len(seen) >= 2  # of FP8's call and of the plain loop's


def test_act_fn_with_a_side_effect_is_called():
    module = experts(before=lambda m: setattr(m, "act_fn", Counted()))
    module.act_fn.calls = 0
    forward(module, *routed())
    assert module.act_fn.calls > 0


def test_forward_of_act_fn_replaced_on_the_instance():
    module = experts()
    module.act_fn.forward = torch.tanh
    assert_as_eager(module)


def test_apply_gate_replaced_on_the_instance():
    module = experts()
    module._apply_gate = lambda h: torch.tanh(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
    assert_as_eager(module, batched_mm_experts_forward)


def test_class_of_the_module_changed_to_one_with_another_gate():
    module = experts()

    class Other(type(module)):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.relu(gate) * up

    module.__class__ = Other
    assert_as_eager(module, batched_mm_experts_forward)


@pytest.mark.parametrize(("name", "value"), [("limit", 0.25), ("alpha", 3.0), ("limit", 0.5)])
def test_numbers_of_a_clamped_gate_changed_after_conversion(name, value):
    module = experts("gpt_oss")
    setattr(module, name, value)
    assert_as_eager(module)


def test_limits_of_one_layer_only():
    model = convert(make("gpt_oss"))
    first, second = (m for n, m in model.named_modules() if n.endswith(".experts"))
    first.limit = 0.25
    assert_as_eager(first)
    assert_as_eager(second)
    first.limit = 7.0
    assert_as_eager(first)


def test_a_gate_that_was_changed_survives_copies_and_revert():
    module = experts()
    module.act_fn = nn.ReLU()
    copied = copy.deepcopy(module)
    assert_as_eager(copied)
    expected = run(copied, eager)
    fp8.revert(module)
    assert relative(run(module)[0], expected[0]) < 1e-5


def test_act_fn_replaced_inside_cached_weights():
    module = experts()
    with torch.no_grad(), fp8.cached_weights(module):
        forward(module, *routed())
        module.act_fn = nn.ReLU()
        y = forward(module, *routed())
    assert relative(y, run(copy.deepcopy(module), eager)[0]) < FORWARD


def test_summary_follows_the_gate():
    model = convert(make("mixtral"))
    line = next(x for x in fp8.summary(model).splitlines() if ".experts" in x)
    assert "not fused" not in line
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.act_fn = nn.ReLU()
    line = next(x for x in fp8.summary(model).splitlines() if ".experts" in x)
    assert "not fused" in line
