"""Small models of transformers, their MLPs fused by fp8.convert: loss and every gradient.

tests/compat/test_fused_mlps.py has more of them.
"""

from __future__ import annotations

import copy

import mlp_models as models
import pytest
import torch
from family_sizes import SIZES, T5

import fp8

transformers = pytest.importorskip("transformers", minversion="5.0")

FAMILIES = {
    "llama": "mlp, gated, silu",
    "qwen2": "mlp, gated, silu",
    "qwen3": "mlp, gated, silu",
    "mistral": "mlp, gated, silu",
    "gemma": "mlp, gated, gelu_tanh",
    "phi3": "mlp, merged, silu",
    "gpt_neox": "mlp, gelu",
    "t5": "mlp, gated, silu",
}


def make(family):
    settings, auto = SIZES, transformers.AutoModelForCausalLM
    if family == "t5":
        settings, auto = T5, transformers.AutoModelForSeq2SeqLM
    config = transformers.AutoConfig.for_model(family, **settings)
    return auto.from_config(config).bfloat16().train()


def step(model):
    tokens = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(3))
    loss = model(input_ids=tokens, labels=tokens).loss.float()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norms", [True, False])
def test_family_trains_as_before(family, norms):
    plain = make(family)
    fused = models.fuse(copy.deepcopy(plain), kinds={"mlp", "norms"} if norms else {"mlp"})
    models.fuse(plain, kinds={"norms"} if norms else False)
    names = [name for name, module in fused.named_modules() if models.is_fused(module)]
    lines = fp8.summary(fused).splitlines()
    assert len(names) == 2
    assert sum(line.endswith(f"fused: {FAMILIES[family]}") for line in lines) == 2
    with models.Nodes() as counter:
        loss, grads = step(fused)
    assert counter.count == 2
    expected, theirs = step(plain)
    assert torch.equal(loss, expected)
    assert grads.keys() == theirs.keys()
    largest = max(float(grad.float().norm()) for grad in theirs.values())
    for name, grad in grads.items():
        if "gated" not in FAMILIES[family] or name.startswith(names[-1]):
            assert torch.equal(grad, theirs[name]), name
            continue
        # Below two weights of one input: their dx is rounded once less, so that scales change, and
        # codes of e5m2 are rounded anew: 2^-4.4 of each twice, 7% a product, 15% after a handful.
        size = theirs[name].float().norm().clamp_min(0.01 * largest)
        assert float((grad.float() - theirs[name].float()).norm() / size) < 0.2, name
