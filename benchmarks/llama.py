"""Llama 3 decoder layers in plain eager code, written as most models are that fp8.convert meets:
attention and the feed-forward network are modules of separate nn.Linear layers, and q and k are
rotated by a function of the file, in transformers' form."""

from __future__ import annotations

import torch
from shapes import BlockShape
from torch import Tensor, nn
from torch.nn import functional


def rotary(
    shape: BlockShape, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """cos and sin, [tokens, head_dim] each, base 500000."""
    half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    angles = torch.outer(torch.arange(shape.tokens, device=device), 500000.0**-half)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k, [batch, heads, tokens, head_dim]."""
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    """Causal attention of groups of queries, of [batch, tokens, hidden]."""

    def __init__(self, shape: BlockShape, device: str, dtype: torch.dtype):
        super().__init__()
        self.shape = shape
        settings = {"bias": False, "device": device, "dtype": dtype}
        kv = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, **settings)
        self.k_proj = nn.Linear(shape.hidden, kv, **settings)
        self.v_proj = nn.Linear(shape.hidden, kv, **settings)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, **settings)
        if shape.rotary:
            cos, sin = rotary(shape, device, dtype)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        heads = (*h.shape[:-1], -1, self.shape.head_dim)
        q = self.q_proj(h).view(heads).transpose(1, 2)
        k = self.k_proj(h).view(heads).transpose(1, 2)
        v = self.v_proj(h).view(heads).transpose(1, 2)
        if self.shape.rotary:
            q, k = rotate(q, k, self.cos, self.sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(h.shape))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: BlockShape, device: str, dtype: torch.dtype):
        super().__init__()
        settings = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, **settings)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, **settings)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, **settings)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm, added to its input [batch, tokens, hidden]."""

    def __init__(
        self, shape: BlockShape, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
    ):
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden, device=device, dtype=dtype)
        self.attention = Attention(shape, device, dtype)
        self.ffn_norm = nn.RMSNorm(shape.hidden, device=device, dtype=dtype)
        self.ffn = FeedForward(shape, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


def decoder(shape: BlockShape, device: str = "cuda") -> nn.Sequential:
    return nn.Sequential(*(DecoderLayer(shape, device) for _ in range(shape.layers)))
