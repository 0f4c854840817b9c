"""Selective activation checkpointing: policies that look for fp8.ops.MATMUL_OPS."""

from __future__ import annotations

import functools

import pytest
import samples
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import fp8


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 32, 32) / 6)
        self.down = nn.Parameter(torch.randn(4, 32, 16) / 6)

    def forward(self, x):
        weights, index = torch.rand(x.shape[0], 4).softmax(-1).topk(2)
        return fp8.ops.moe_experts(x, index, weights, self.gate_up, self.down)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = fp8.GroupedLinear(2, 32, 32)

    def forward(self, x):
        return self.layer(x, torch.tensor([3, 8], dtype=torch.int32))


BLOCKS = {
    **{
        recipe: lambda recipe=recipe: nn.Sequential(
            fp8.Linear(32, 48, recipe=recipe), nn.GELU(), fp8.Linear(48, 32, recipe=recipe)
        )
        for recipe in ("tensorwise", "rowwise", "rowwise_gw_hp", "blockwise")
    },
    "grouped": lambda: nn.Sequential(Grouped(), nn.GELU()),
    "experts": lambda: nn.Sequential(Experts(), nn.GELU()),
}


def run(block, policy=None):
    """Results, floating-point operations and how often the policy heard of FP8 operators."""
    heard = []

    def decide(context, op, *args, **kwargs):
        if op in fp8.ops.MATMUL_OPS:
            heard.append(context.is_recompute)
            return policy
        return CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(1)
    x = torch.randn(8, 32).requires_grad_()
    block.zero_grad()
    with FlopCounterMode(display=False) as counter:
        if policy is None:
            y = block(x)
        else:
            contexts = functools.partial(create_selective_checkpoint_contexts, decide)
            y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        y.square().sum().backward()
    gradients = [p.grad for p in block.parameters()]
    return [y.detach(), x.grad, *gradients], counter.get_total_flops(), heard


@pytest.mark.parametrize("kind", BLOCKS)
def test_selective_checkpointing_saves_products(kind):
    block = BLOCKS[kind]()
    expected, flops, _ = run(block)
    for policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE):
        results, counted, heard = run(block, policy)
        assert all(map(torch.equal, results, expected))
        assert heard.count(False) == (2 if kind in fp8.RECIPES else 1)
        assert (counted > flops) == (policy == CheckpointPolicy.PREFER_RECOMPUTE)


def test_selective_checkpointing_names_every_forward():
    names = {op._schema.name.removeprefix("fp8::") for op in fp8.ops.MATMUL_OPS}
    public = {n for n in samples.public_namespace() if not n.startswith(("quantize", "dequant"))}
    forward = {n for n in samples.namespace() if n.endswith("_forward")}
    without_products = {"rms_norm", "layer_norm", "add_rms_norm", "_norm_forward", "rope"}
    assert names == (public | forward) - {"scaled_mm_accumulate_"} - without_products
