"""fp8.convert's fusion of norms: what is recognized, what stays as it was, what falls back."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_norms import WIDTH, fuse, is_fused
from model_norms import NORMS, Constant, Llamas, Olmos
from reference import assert_same_bits
from torch import nn
from torch.nn.utils import parametrize

import fp8
from fp8.nn import _fused_norms


def calls_of(monkeypatch):
    """How many fused calls there were, as a list that grows."""
    seen = []
    for name in ("_rms_norm", "_layer_norm"):
        op = getattr(_fused_norms, name)

        def count(*args, op=op):
            seen.append(op)
            return op(*args)

        monkeypatch.setattr(_fused_norms, name, count)
    return seen


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_is_recognized_by_what_it_computes(monkeypatch, device, name, dtype):
    module = NORMS[name]().to(device, dtype)
    parameters, state = dict(module.named_parameters()), module.state_dict()
    kind, before = type(module), copy.deepcopy(module)
    assert fuse(module) is module
    assert is_fused(module)
    assert isinstance(module, kind)
    assert type(module).__name__ == kind.__name__
    assert all(p is parameters[n] for n, p in module.named_parameters())
    assert list(module.state_dict()) == list(state)
    seen = calls_of(monkeypatch)
    x, y = (torch.randn(4, 7, WIDTH, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    ours, eager = module(x), before(x)
    assert len(seen) == 1
    torch.testing.assert_close(ours, eager, rtol=2**-6 if dtype.itemsize == 2 else 1e-5, atol=1e-5)
    if dtype.itemsize == 2:
        assert float((ours == eager).float().mean()) > 0.98
    leaves = [x, *parameters.values()]
    grads = torch.autograd.grad(ours, leaves, y)
    theirs = torch.autograd.grad(eager, [x, *before.parameters()], y)
    for a, b in zip(grads, theirs, strict=True):
        step = 2**-5 if dtype.itemsize == 2 else 1e-4
        torch.testing.assert_close(a, b, rtol=step, atol=step * float(b.abs().max()))


class Wrong:
    """Modules that are nearly norms."""

    class Detached(Olmos):
        def forward(self, x):
            wide = x.float()
            root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.small).detach()
            return (self.gamma * (wide * root)).to(x.dtype)

    class Noisy(Olmos):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    class Shifted(Olmos):
        def forward(self, x):
            return super().forward(x) + float(self.training)

    class Sum(Olmos):
        def forward(self, x):
            return super().forward(x) + x

    class InPlace(Olmos):
        def forward(self, x):
            return x.copy_(super().forward(x))

    class Stateful(Olmos):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps += 1
            return super().forward(x)

    class Clamped(Olmos):
        def forward(self, x):
            return super().forward(x.clamp(-50, 50))

    class TwoInputs(Olmos):
        def forward(self, x, gate):
            return super().forward(x) * gate


@pytest.mark.parametrize("name", [n for n in vars(Wrong) if not n.startswith("_")])
def test_what_is_nearly_a_norm_is_left_alone(name):
    module = getattr(Wrong, name)()
    random, attributes = torch.get_rng_state(), dict(vars(module))
    fuse(module)
    assert not is_fused(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert vars(module).keys() == attributes.keys()


@pytest.mark.parametrize("kind", [nn.Identity, nn.SiLU, nn.Softmax, nn.BatchNorm1d, nn.GroupNorm])
def test_other_modules_are_left_alone(kind):
    arguments = {nn.BatchNorm1d: (WIDTH,), nn.GroupNorm: (1, WIDTH)}
    assert type(fuse(kind(*arguments.get(kind, ())))) is kind


def test_layer_norm_over_two_dimensions_is_left_alone():
    assert type(fuse(nn.LayerNorm((3, WIDTH)))) is nn.LayerNorm


def falls_back(monkeypatch, module, *args, **kwargs):
    """The call computes what the class's own forward does, bit for bit, and nothing is fused."""
    seen = calls_of(monkeypatch)
    base = _fused_norms.original(type(module)) or type(module)
    before = len(seen)
    result = module(*args, **kwargs)
    if not any(isinstance(b, parametrize.ParametrizationList) for b in module.children()):
        expected = base.forward(module, *args, **kwargs)
        assert torch.equal(result, expected)
    assert len(seen) == before
    return result


def test_calls_of_another_kind_run_the_classs_own_forward(monkeypatch):
    module = fuse(Constant().bfloat16())
    x = torch.randn(5, WIDTH, dtype=torch.bfloat16)
    seen = calls_of(monkeypatch)
    module(x)
    assert len(seen) == 1
    falls_back(monkeypatch, module, x, x)
    falls_back(monkeypatch, module, x, gate=x)
    falls_back(monkeypatch, module, x=x)
    falls_back(monkeypatch, module, x.double())
    falls_back(monkeypatch, module, x[0, 0])


def test_a_changed_eps_is_used(monkeypatch):
    module = fuse(Llamas().bfloat16())
    x = 1e-3 * torch.randn(5, WIDTH, dtype=torch.bfloat16)
    module.small = 1.0
    falls_back(monkeypatch, module, x)
    assert "- (not fused: its small has changed)" in fp8.summary(module)
    module.small = 1e-2
    fuse(module)  # found again, as it is now
    seen = calls_of(monkeypatch)
    assert_same_bits(module(x), fp8.ops.rms_norm(x, module.gamma, 1e-2, "round_then_scale"), "eps")
    assert len(seen) == 1


def test_another_weight_is_used(monkeypatch):
    module = fuse(Llamas())
    x = torch.randn(5, WIDTH)
    seen = calls_of(monkeypatch)
    module.gamma = nn.Parameter(torch.randn(WIDTH))
    assert_same_bits(module(x), fp8.ops.rms_norm(x, module.gamma, 1e-6), "new weight")
    assert len(seen) == 1
    module.gamma = nn.Parameter(torch.randn(1))  # broadcast
    falls_back(monkeypatch, module, x)


def test_a_forward_on_the_instance_rules(monkeypatch):
    module = Llamas()
    module.forward = lambda x: x + 1
    assert not is_fused(fuse(module))
    late = fuse(Llamas())
    late.forward = lambda x: x + 1
    assert torch.equal(late(torch.zeros(2, WIDTH)), torch.ones(2, WIDTH))


def test_a_forward_replaced_in_the_class_rules(monkeypatch):
    class Mine(Llamas):
        pass

    module = fuse(Mine())
    monkeypatch.setattr(Llamas, "forward", lambda self, x: x + 1)
    assert torch.equal(module(torch.zeros(2, WIDTH)), torch.ones(2, WIDTH))


def test_hooks_run(monkeypatch):
    module = fuse(Llamas())
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    module.register_forward_hook(lambda m, args, y: y + 1)
    x = torch.randn(3, WIDTH)
    assert torch.equal(module(x), fp8.ops.rms_norm(2 * x, module.gamma, 1e-6) + 1)


def test_a_parametrized_weight_is_used():
    module = fuse(Llamas())
    x = torch.randn(3, WIDTH)

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    expected = 2 * module(x)
    parametrize.register_parametrization(module, "gamma", Doubled())
    torch.testing.assert_close(module(x), expected)
    with pytest.warns(UserWarning, match="fp8.revert.*stays fused"):
        fp8.revert(module)


def test_a_tensor_subclass_runs_the_classs_own_forward(monkeypatch):
    class Mine(torch.Tensor):
        pass

    module = fuse(Llamas())
    falls_back(monkeypatch, module, torch.randn(3, WIDTH).as_subclass(Mine))
