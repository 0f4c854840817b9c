"""A norm, and what tests of fp8.convert's fusion ask of one."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import fp8
from fp8.nn import _fused_norms

WIDTH = 32


def fuse(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing in FP8
        return fp8.convert(model, filter=lambda *_: False, fuse={"norms"})


def is_fused(module):
    return _fused_norms.original(type(module)) is not None


def normed(x, eps, dim=-1):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=True) + eps)).to(x.dtype)


class Weighted(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self._eps = eps

    def forward(self, x):
        return (self.weight * normed(x.float(), self._eps)).to(x.dtype)
