"""A small decoder-only transformer over bytes: RMSNorm, rotary attention, SwiGLU.

Plain PyTorch with nothing of fp8 in it: the linears are separate nn.Linear modules, and fp8.convert
replaces those inside the blocks. lm_head stays in high precision, as is usual for FP8 training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of the model."""

    width: int
    hidden: int  # inside the MLP
    layers: int
    heads: int
    vocabulary: int = 256
    bias: bool = False  # of the linears inside the blocks


def rotary_tables(length: int, head_width: int, device: torch.device) -> torch.Tensor:
    """cos and sin of the rotary embedding: [2, length, head_width / 2] fp32."""
    frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device).float() / head_width)
    angle = torch.arange(length, device=device).float()[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Rotates [batch, heads, length, head_width] by position; halves are paired."""
    cos, sin = tables.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention: [batch, length, width] to the same shape."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.q_proj = nn.Linear(size.width, size.width, bias=size.bias)
        self.k_proj = nn.Linear(size.width, size.width, bias=size.bias)
        self.v_proj = nn.Linear(size.width, size.width, bias=size.bias)
        self.o_proj = nn.Linear(size.width, size.width, bias=size.bias)

    def forward(self, x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(
            rotate(q, tables), rotate(k, tables), v, is_causal=True
        )  # [batch, heads, length, head_width]
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: [batch, length, width] to the same shape."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.hidden, bias=size.bias)
        self.up_proj = nn.Linear(size.width, size.hidden, bias=size.bias)
        self.down_proj = nn.Linear(size.hidden, size.width, bias=size.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(size.width)
        self.attention = Attention(size)
        self.mlp_norm = nn.RMSNorm(size.width)
        self.mlp = MLP(size)

    def forward(self, x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), tables)
        return x + self.mlp(self.mlp_norm(x))


class ByteModel(nn.Module):
    """Token ids [batch, length] int64 to logits [batch, length, vocabulary]."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.lm_head = nn.Linear(size.width, size.vocabulary, bias=False)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # Layers that write to the residual stream start smaller, by its number of terms.
                terms = 2 * self.size.layers if name.endswith(("o_proj", "down_proj")) else 1
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features * terms))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight)
        self.lm_head.weight.mul_(0.1)  # so that the first loss is near ln(256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        head_width = self.size.width // self.size.heads
        tables = rotary_tables(tokens.shape[1], head_width, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, tables)
        return self.lm_head(self.norm(x))


def parameter_count(model: nn.Module) -> int:
    """Number of trained values, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
