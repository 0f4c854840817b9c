"""fp8.convert's fusion of MLPs: what is recognized, and that it computes what the module did."""

from __future__ import annotations

import copy

import mlp_models as models
import pytest
import torch
from mlp_models import K, assert_same_step, data, fuse, is_fused, nodes, pair
from mlp_reference import NAMES, Problem
from reference import assert_same_bits
from test_mlp_values import assert_dx_close
from torch import nn
from torch.nn import functional as F

import fp8
from fp8.conversion import _mlp_fusion
from fp8.nn._mlp_probe import probe

FORMS = {
    "gated": models.Gated,
    "merged": models.Merged,
    "gate second": models.MergedSecond,
    "plain": models.Plain,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mlp_is_recognized_and_is_itself(form, activation, dtype):
    module = FORMS[form](models.ACTIVATIONS[activation]())
    kind, state, parameters = type(module), list(module.state_dict()), [*module.parameters()]
    fused, plain = pair(module, dtype=dtype)
    assert fused is module
    assert isinstance(fused, kind)
    assert type(fused).__name__ == kind.__name__
    assert list(fused.state_dict()) == state
    assert all(a is b for a, b in zip(fused.parameters(), parameters, strict=True))
    assert f"{activation}" in fp8.summary(fused)
    assert_same_step(fused, plain, data(dtype), two=form == "gated")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_mlp_recipes_with_biases(form, recipe):
    fused, plain = pair(FORMS[form](bias=True), recipe)
    for _ in range(3):  # with delayed: through histories of its own
        assert_same_step(fused, plain, data(), two=form == "gated")


def test_mlp_histories_are_the_layers():
    """x is quantized with the gate's; else each layer's history is what it was."""
    fused, plain = pair(models.Gated(), "delayed")
    for scale in (1.0, 4.0, 0.5):
        assert_same_step(fused, plain, scale * data(), two=True)
    ours, theirs = (
        {name: getattr(module, name).amax_history for name in "abc"} for module in (fused, plain)
    )
    for name, rows in {"a": slice(1, None), "b": slice(1, None), "c": slice(None)}.items():
        assert_same_bits(ours[name][rows], theirs[name][rows], name)
    assert_same_bits(ours["b"][0], theirs["a"][0], "of x, by the layer that had it first")


def test_mlp_gradient_of_x_has_one_rounding_less():
    fused, plain = pair(models.Gated(bias=True))
    case = Problem({}, torch.randn(18, K, dtype=torch.bfloat16), "separate")
    layers = {"gate": plain.b, "up": plain.a, "down": plain.c}
    case.leaves = {"x": data(torch.bfloat16, 18)}
    case.leaves |= {name: layer.weight for name, layer in layers.items()}
    case.leaves |= {f"{name}_bias": layer.bias for name, layer in layers.items()}
    assert case.leaves.keys() == set(NAMES)
    grads = []
    for module in (fused, plain):
        x = case.leaves["x"].clone().requires_grad_()
        module(x).backward(case.dy)
        grads.append(x.grad)
    assert_dx_close(case, *grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mlp_clamped(dtype):
    fused, plain = pair(models.Clamped(), dtype=dtype)
    assert "clamped_silu" in fp8.summary(fused)
    assert_same_step(fused, plain, 3 * data(dtype), two=True)


def test_mlp_sequential():
    fused, plain = pair(models.sequential())
    assert_same_step(fused, plain, data())
    assert isinstance(fused, nn.Sequential)
    assert fused[:2](data()).shape == (2, 9, models.FEATURES)  # of its class, but no MLP
    fused.append(nn.Tanh())
    plain.append(nn.Tanh())
    assert_same_step(fused, plain, data(), node=False)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 2, 2, 2)], ids=str)
def test_mlp_dimensions(shape):
    fused, plain = pair(models.Plain())
    x = data(torch.bfloat16, *shape) if shape else data()[0, 0]
    assert_same_step(fused, plain, x, node=len(shape) < 4)  # those that were looked at


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu_squared"])
def test_mlp_autocast(autocast, activation):
    fused, plain = pair(models.Gated(models.ACTIVATIONS[activation]()), dtype=torch.float32)
    x = data(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_same_step(
            fused, plain, x, node=activation != "relu_squared" or not autocast, two=True
        )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fused(x).dtype == torch.bfloat16


def test_mlp_autocast_that_the_module_turns_off():
    class Off(models.Plain):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x)

    fused, plain = pair(Off(), dtype=torch.float32)
    assert_same_step(fused, plain, data(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(fused, plain, data(torch.float32), node=False)


def test_mlp_needs_fp8_layers():
    half = models.Gated()
    fp8.convert(half, filter=lambda _, name: name != "c", fuse={"mlp"})
    assert not is_fused(half)
    with pytest.warns(UserWarning, match="converted nothing"):
        fp8.convert(copy.deepcopy(models.Gated()), filter=lambda *_: False, fuse={"mlp"})
    model = nn.Sequential(fuse(models.Gated()), half)
    lines = fp8.summary(model).splitlines()
    assert any(line.endswith("- (not fused: c is not in FP8)") for line in lines)


def test_mlp_is_fused_by_default():
    model = nn.Sequential(models.Gated(), nn.LayerNorm(K))
    fp8.convert(model, filter=lambda *_: True, fuse=False)
    assert not is_fused(model[0])
    assert "mlp" not in fp8.summary(model)
    assert is_fused(fp8.convert(copy.deepcopy(model), filter=lambda *_: True)[0])
    both = fuse(model, kinds={"norms", "mlp"})
    assert is_fused(both[0])
    assert nodes(both, data(torch.float32)) == 1
    assert {"1 norms fused", "1 mlp fused"} <= set(fp8.summary(both).splitlines())
    assert not is_fused(fuse(model, kinds={"norms"})[0])


def test_mlp_of_fp8_is_left_as_it_is():
    assert type(fuse(fp8.GatedMLP(K, 48))) is fp8.GatedMLP


def test_mlp_meta_and_modes_of_the_caller():
    """Found whatever the caller's device, dtype and modes; its generator is not touched."""
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad(), torch.autocast("cpu"):
            module = models.Gated().bfloat16()
            assert is_fused(fuse(module))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_mlp_functions_are_activations():
    for act in (nn.ReLU(inplace=True), F.silu, torch.relu, nn.functional.gelu):
        assert is_fused(fuse(models.Gated(act)))


def test_mlps_that_are_alike_are_asked_once(monkeypatch):
    """A model's layers share an answer; what a value, a child or an object tells apart does not."""
    asked = []

    def counted(module, base):
        asked.append(module)
        return probe(module, base)

    monkeypatch.setattr(_mlp_fusion, "probe", counted)
    alike = nn.ModuleList([models.Gated(nn.GELU()) for _ in range(3)])
    assert all(map(is_fused, fuse(alike)))
    assert len(asked) == 1

    asked.clear()
    kinds = [
        *(models.Gated(act) for act in (F.silu, nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"))),
        *(models.Gated(nn.ReLU(), bias=bias) for bias in (True, False)),
        *(models.Clamped() for _ in range(2)),
    ]
    kinds[-1].limit = 3.0
    kinds.append(models.Gated(lambda x: x.exp()))  # no MLP
    fused = fuse(nn.ModuleList(kinds))
    assert len(asked) == len(kinds)
    assert [is_fused(module) for module in fused] == [True] * 8 + [False]
    lines = [line for line in fp8.summary(fused).splitlines() if "gated, " in line]
    found = [line.split("gated, ")[1].split()[0] for line in lines]
    assert found[:6] == ["silu", "silu", "gelu", "gelu_tanh", "relu", "relu"]
    fused[-2].load_state_dict(fused[-3].state_dict())
    x = 8 * data(torch.float32)
    assert not torch.equal(fused[-2](x), fused[-3](x))  # limits of their own
