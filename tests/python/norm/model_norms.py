"""Norms as models write them, of which fp8.convert recognizes each."""

from __future__ import annotations

import torch
from fused_norms import WIDTH
from torch import nn


class Weighted(nn.Module):
    """What the norms below share; each writes its formula as some model does."""

    def __init__(self, width: int = WIDTH, eps: float = 1e-6, ones: float = 1.0):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), ones) + 0.1 * torch.randn(width))
        self.small = eps

    def hat(self, x):
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.small)


class Llamas(Weighted):
    def forward(self, hidden_states):
        return self.gamma * self.hat(hidden_states).to(hidden_states.dtype)


class Olmos(Weighted):
    def forward(self, x):
        return (self.gamma * self.hat(x)).to(x.dtype)


class Gemmas(Weighted):
    def forward(self, x):
        return (self.hat(x) * (1.0 + self.gamma.float())).type_as(x)


class Constant(Weighted):
    """eps is in the code, and a second argument may change everything."""

    def forward(self, x, gate=None):
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        y = self.gamma * y.to(x.dtype)
        return y if gate is None else y * gate


class Bare(nn.Module):
    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )


NORMS = {
    "round_then_scale": Llamas,
    "scale_then_round": Olmos,
    "scale_by_one_plus": lambda: Gemmas(ones=0.0),
    "constant eps": Constant,
    "no weight": Bare,
    "torch's RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "torch's RMSNorm, eps by default": lambda: nn.RMSNorm(WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "layer norm, no bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "layer norm, nothing": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
}
