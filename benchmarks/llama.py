"""Llama 3 decoder layers in plain eager code: the linears are separate nn.Linear modules, as in
most models that fp8.convert meets."""

from __future__ import annotations

import torch
from shapes import BlockShape
from torch import Tensor, nn
from torch.nn import functional


def rotary(shape: BlockShape, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin, [tokens, head_dim], base 500000."""
    half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    angles = torch.outer(torch.arange(shape.tokens, device=device), 500000.0**-half)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, heads, tokens, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm, added to its input [batch, tokens, hidden]."""

    def __init__(
        self, shape: BlockShape, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
    ):
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head_dim

        def linear(k: int, n: int) -> nn.Linear:
            return nn.Linear(k, n, bias=False, device=device, dtype=dtype)

        self.attention_norm = nn.RMSNorm(shape.hidden, device=device, dtype=dtype)
        self.q_proj, self.o_proj = (linear(shape.hidden, shape.hidden) for _ in range(2))
        self.k_proj, self.v_proj = (linear(shape.hidden, kv) for _ in range(2))
        self.ffn_norm = nn.RMSNorm(shape.hidden, device=device, dtype=dtype)
        self.gate_proj, self.up_proj = (linear(shape.hidden, shape.ffn) for _ in range(2))
        self.down_proj = linear(shape.ffn, shape.hidden)
        cos, sin = rotary(shape, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        h = self.ffn_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))

    def attention(self, h: Tensor) -> Tensor:
        batch, tokens, hidden = h.shape
        q, k, v = (
            projection(h).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, hidden))


def decoder(shape: BlockShape, device: str = "cuda") -> nn.Sequential:
    return nn.Sequential(*(DecoderLayer(shape, device) for _ in range(shape.layers)))
