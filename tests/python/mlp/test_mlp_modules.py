"""fp8.GatedMLP and fp8.MLP: one node where their layers are plain, else layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import assert_same_bits
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import fp8
from fp8.nn._mlp import _ACTIVATIONS


def gated(device, recipe="tensorwise", **options):
    torch.manual_seed(3)
    return fp8.GatedMLP(64, 96, device=device, dtype=torch.bfloat16, recipe=recipe, **options)


def by_layers(block, x):
    act = _ACTIVATIONS[block.activation]
    if isinstance(block, fp8.MLP):
        return block.fc2(act(block.fc1(x)))
    return block.down_proj(act(block.gate_proj(x)) * block.up_proj(x))


class Nodes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the blocks that ran as one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fp8._mlp_forward.default or func is torch.ops.fp8.mlp.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def is_one_node(block, x):
    with Nodes() as nodes:
        block(x)
    return nodes.count == 1


@pytest.mark.parametrize("recipe", fp8.RECIPES)
@pytest.mark.parametrize("save", ["bf16", "recompute"])
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_block_is_its_layers(device, recipe, save, kind):
    options = {"device": device, "dtype": torch.bfloat16, "recipe": recipe, "save": save}
    block = fp8.GatedMLP(64, 96, **options) if kind == "gated" else fp8.MLP(64, 96, **options)
    twin = copy.deepcopy(block)
    x = torch.randn(3, 8, 64, device=device, dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    for step in range(2):
        y, expected = block(x * (step + 1)), by_layers(twin, x * (step + 1))
        assert_same_bits(y.detach(), expected.detach())
        y.backward(dy)
        expected.backward(dy)
    for (name, found), wanted in zip(block.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(found.grad, wanted.grad, name)
    assert is_one_node(block, x)


def test_block_has_the_names_of_models():
    assert set(gated("cpu").state_dict()) == {f"{n}_proj.weight" for n in ("gate", "up", "down")}
    assert set(fp8.MLP(16, 32).state_dict()) == {
        f"{name}.{what}" for name in ("fc1", "fc2") for what in ("weight", "bias")
    }


def hook(block):
    block.up_proj.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(block):
    block.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(block):
    block.gate_proj.register_full_backward_hook(lambda module, grads, outs: (grads[0] * 2,))


def own_forward(block):
    block.gate_proj.forward = lambda x: F.linear(x, block.gate_proj.weight)


def wrapper(block):
    block.up_proj = nn.Sequential(block.up_proj, nn.Identity())


def subclass(block):
    class Mine(fp8.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    block.down_proj.__class__ = Mine


def parametrization(block):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(block.up_proj, "weight", Doubled())


def other_recipe(block):
    block.up_proj.recipe = "rowwise"


def main_grad(block):
    block.gate_proj.weight.main_grad = torch.zeros(96, 64)


def static_scale(block):
    block.gate_proj.input_scale = torch.tensor(0.01)


CHANGES = (
    hook,
    pre_hook,
    backward_hook,
    own_forward,
    wrapper,
    subclass,
    parametrization,
    other_recipe,
    main_grad,
    static_scale,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_block_calls_layers_that_are_more_than_that(change):
    block = gated("cpu")
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    assert is_one_node(block, x)
    change(block)
    assert not is_one_node(block, x)
    twin = copy.deepcopy(block) if change not in (own_forward, subclass) else block
    assert_same_bits(block(x).detach(), by_layers(twin, x).detach())


def test_hooks_of_all_modules_see_the_layers_of_a_block():
    block, seen = gated("cpu"), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        assert not is_one_node(block, torch.randn(8, 64, dtype=torch.bfloat16))
    finally:
        handle.remove()
    assert set(block.children()) <= set(seen)


def test_block_counts_its_layers_as_called():
    block = gated("cpu")
    block(torch.randn(8, 64, dtype=torch.bfloat16)).sum().backward()
    assert all(layer.fp8_called for layer in block.children())


def test_block_compiles(device):
    block = gated(device)
    x = torch.randn(8, 64, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(x).detach(), block(x).detach())


@pytest.mark.parametrize("module", [fp8.GatedMLP, fp8.MLP])
def test_block_errors(module):
    with pytest.raises(ValueError, match="expected an activation out of"):
        module(16, 32, activation="tanh")
    with pytest.raises(ValueError, match="expected save"):
        module(16, 32, save="int8")
    with pytest.raises(ValueError, match="recipe"):
        module(16, 32, recipe="fast")


def test_block_repr():
    assert "activation=silu, save=recompute" in repr(gated("cpu", save="recompute"))


@pytest.mark.parametrize("kind", [fp8.GatedMLP, fp8.MLP])
def test_block_saves_fp8(kind):
    block = kind(64, 96, dtype=torch.bfloat16, save="fp8")
    twin = copy.deepcopy(block)
    twin.save = "bf16"
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    y, expected = block(x), twin(x)
    assert_same_bits(y.detach(), expected.detach())
    y.sum().backward()
    expected.sum().backward()
    pairs = [(p.grad, q.grad) for p, q in zip(block.parameters(), twin.parameters(), strict=True)]
    assert not all(torch.equal(found, other) for found, other in pairs)
