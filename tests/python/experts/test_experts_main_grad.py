"""main_grad of the experts of transformers: both weights, stored either way, fused and composed."""

from __future__ import annotations

import copy

import pytest
import torch
from converted_experts import call, converted
from reference import assert_same_bits
from torch import Tensor

import fp8
from fp8.integrations.transformers import _experts as experts

NAMES = ("gate_up_proj", "down_proj")


def composed(family: str = "mixtral"):
    """With a gate that no operator knows."""
    module = converted(family)
    kind = type(module)
    module.__class__ = type(
        "Own", (kind,), {"_apply_gate": lambda self, x: x.chunk(2, -1)[0].cos()}
    )
    return module


def step(module, hidden: Tensor, *routing: Tensor) -> dict[str, Tensor | None]:
    x = hidden.clone().requires_grad_()
    y = module(x, *routing)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))
    return {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("make", [converted, composed], ids=["fused", "composed"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # gpt_oss stores them transposed
@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_gw_hp", "blockwise"])
def test_experts_main_grad(make, family, recipe):
    """Overwritten, the buffers have the bits of the gradients; added to, their sum."""
    module = make(family)
    fp8.convert(module, filter=lambda module, name: True, experts_recipe=recipe)
    arguments = call(module)
    plain = step(copy.deepcopy(module), *arguments)
    for name in NAMES:
        weight = module.get_parameter(name)
        weight.main_grad = torch.full(weight.shape, float("nan"))
        weight.overwrite_main_grad = True
    found = step(module, *arguments)
    for name in NAMES:
        weight = module.get_parameter(name)
        assert found.pop(name) is None
        assert_same_bits(weight.main_grad, plain[name], name)
        weight.overwrite_main_grad = False
    for name, grad in found.items():
        assert_same_bits(grad, plain[name], name)
    module.zero_grad()
    step(module, *arguments)
    for name in NAMES:
        torch.testing.assert_close(module.get_parameter(name).main_grad, 2 * plain[name])


@pytest.mark.parametrize("make", [converted, composed], ids=["fused", "composed"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_main_grad_attributes(make, family):
    """One weight with a buffer, the other without; the note, and a gradient for hooks."""
    module = make(family)
    weight, other = (module.get_parameter(name) for name in NAMES)
    weight.main_grad = torch.zeros(weight.shape)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = True
    seen = []
    weight.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    step(module, *call(module))
    assert weight.grad_added_to_main_grad
    assert [t.shape for t in seen] == [weight.shape]
    assert not seen[0].any()
    assert weight.main_grad.any()
    assert other.grad.any()


def test_experts_main_grad_of_another_kind():
    module = converted()
    module.gate_up_proj.main_grad = 3
    with pytest.raises(TypeError, match=r"fp8 experts: expected weight\.main_grad to be a tensor"):
        module(*call(module))
    module.gate_up_proj.main_grad = None
    assert experts.in_fp8(module)
    assert step(module, *call(module))["gate_up_proj"].any()
