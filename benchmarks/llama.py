"""Llama 3 decoder layers in plain eager code: the linears are separate nn.Linear modules, as in
most models that fp8.convert meets."""

from __future__ import annotations

import torch
from shapes import BlockShape
from torch import Tensor, nn
from torch.nn import functional


def rotary(
    shape: BlockShape, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """cos and signed sin, [tokens, 1, head_dim], base 500000. The first half of sin is negated, so
    that `rotate` needs no negation."""
    half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    angles = torch.outer(torch.arange(shape.tokens, device=device), 500000.0**-half).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding of x, [batch, tokens, heads, head_dim], in three kernels.

    x · cos + rotate_half(x) · sin, where rotate_half(x) = [-second half, first half]: x with its
    halves swapped (rolled by half), the sign moved into sin.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


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
        if shape.rotary:
            cos, signed_sin = rotary(shape, device, dtype)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("signed_sin", signed_sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        h = self.ffn_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))

    def attention(self, h: Tensor) -> Tensor:
        batch, tokens, hidden = h.shape
        q, k, v = (
            projection(h).view(batch, tokens, -1, self.shape.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.shape.rotary:  # while rows are contiguous, hence before the transpose
            q = rotate(q, self.cos, self.signed_sin)
            k = rotate(k, self.cos, self.signed_sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, hidden))


def decoder(shape: BlockShape, device: str = "cuda") -> nn.Sequential:
    return nn.Sequential(*(DecoderLayer(shape, device) for _ in range(shape.layers)))
