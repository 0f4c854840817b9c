"""torch.compile: one graph, the bits of eager mode, also where the number of rows changes."""

from __future__ import annotations

import grouped_reference as reference
import test_moe_experts as moe
import torch
from reference import assert_same_bits

OPS = torch.ops.fp8


def test_grouped_linear_compiles(device):
    compiled = torch.compile(
        lambda *args: OPS.grouped_linear(*args).sin(), fullgraph=True, backend="aot_eager"
    )
    for counts in ((30, 0, 12), (5, 40, 16), (64, 3, 3)):
        p = reference.problem(counts, 64, 48, device=device)
        results = []
        for run in (compiled, lambda *args: OPS.grouped_linear(*args).sin()):
            x, weight, bias = (t.detach().requires_grad_() for t in (p.x, p.weight, p.bias))
            y = run(x, weight, p.offsets, bias)
            results.append([y, *torch.autograd.grad(y, [x, weight, bias], p.dy)])
        for ours, theirs in zip(*results, strict=True):
            assert_same_bits(ours.detach(), theirs.detach())


def test_moe_experts_compiles(device):
    compiled = torch.compile(OPS.moe_experts, fullgraph=True, backend="aot_eager")
    for tokens in (40, 24):
        tensors = moe.problem(tokens, device=device)
        results = []
        for run in (compiled, OPS.moe_experts):
            leaves = [
                t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
                for t in tensors
            ]
            y = run(*leaves)
            wanted = [t for t in leaves if t is not None and t.requires_grad]
            results.append([y, *torch.autograd.grad(y, wanted, torch.ones_like(y))])
        for ours, theirs in zip(*results, strict=True):
            assert_same_bits(ours.detach(), theirs.detach())
