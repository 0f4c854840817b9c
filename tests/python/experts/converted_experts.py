"""An experts module in FP8 whose gating is known, and what it is called with."""

from __future__ import annotations

import copy
import functools

import torch
from tiny_models import experts_of, make, relative, routing, transformers
from torch import nn

import fp8
from fp8.integrations.transformers import _experts as experts


@functools.cache
def original(family: str) -> nn.Module:
    return next(iter(experts_of(make(family)).values()))


def converted(family: str = "mixtral") -> nn.Module:
    """An experts module in FP8 that has run once, so that its gating is known."""
    module = copy.deepcopy(original(family))
    fp8.convert(module, filter=lambda module, name: True)
    module(*call(module))
    assert experts.gate_of(module) is not None
    return module


def call(module):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(12, 64, generator=generator)
    torch.manual_seed(1)
    return hidden, *routing(12, 2, module.num_experts)


def exact(module):
    """An implementation of transformers that, like FP8's, goes through _apply_gate."""
    functions = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    return functions["batched_mm"](module, *call(module))


def error(module):
    return relative(module(*call(module)), exact(module))


class Swish(nn.Module):
    def __init__(self, beta=1.0):
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)
