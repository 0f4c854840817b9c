"""Models that tests freeze, and how two of them are compared."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import torch
from reference import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional as F

import fp8

ODD = ((64, 32), (40, 37), (300, 130), (129, 257), (256, 2), (17, 5), (16, 1))
"""in_features and out_features: multiples of 16 and 128, and what is left of them."""


def every(module: nn.Module, name: str) -> bool:
    return True


def convert(model: nn.Module, recipe: str, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fp8.convert(model, recipe, filter=every, **options)


class Block(nn.Module):
    """Attention's projections, which read one tensor, a norm and a gated MLP; [B, T, width]."""

    def __init__(self, width: int = 64, bias: bool = True, small: int = 32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, small, bias)
        self.v_proj = nn.Linear(width, small, bias)
        self.o_proj = nn.Linear(width, width, bias)
        self.mlp = GatedUnit(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        scores = (q[..., : k.shape[-1]] * k).softmax(-1) * v
        x = x + self.o_proj(torch.cat([scores, q], -1)[..., : x.shape[-1]])
        return x + self.mlp(x)


class GatedUnit(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def language_model(tied: bool = False, **options) -> nn.Sequential:
    """[B, T] tokens -> [B, T, 48] logits."""
    model = nn.Sequential(
        OrderedDict(
            embed=nn.Embedding(48, 64),
            blocks=nn.Sequential(Block(**options), Block(**options)),
            norm=nn.LayerNorm(64),
            lm_head=nn.Linear(64, 48, bias=False),
        )
    )
    if tied:
        model.lm_head.weight = model.embed.weight
    return model.bfloat16().eval()


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """The same names, dtypes and bits."""
    mine, others = actual.state_dict(), expected.state_dict()
    assert list(mine) == list(others)
    for name, value in mine.items():
        assert_same_bits(value, others[name], name)


def frozen_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if type(m) is fp8.FrozenLinear]
