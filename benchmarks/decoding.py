"""The decoder of llama.py as it generates: one token of each sequence in a step, with the keys and
values of the tokens before it in a cache of fixed size, so that a CUDA graph can hold the step."""

from __future__ import annotations

import llama
import torch
from shapes import BlockShape
from torch import Tensor, nn
from torch.nn import functional


class CachedAttention(llama.Attention):
    """Of the newest token, [batch, 1, hidden], which is the last of shape.tokens."""

    def __init__(self, shape: BlockShape, device: str, dtype: torch.dtype):
        super().__init__(shape, device, dtype)
        lines = (2, shape.sequences, shape.kv_heads, shape.tokens, shape.head_dim)
        self.register_buffer("cache", torch.randn(lines, device=device, dtype=dtype), False)

    def forward(self, h: Tensor) -> Tensor:
        heads = (*h.shape[:-1], -1, self.shape.head_dim)
        q, k, v = (
            layer(h).view(heads).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = llama.rotate(q, k, self.cos[-1:], self.sin[-1:])
        keys, values = self.cache[0], self.cache[1]
        keys[:, :, -1:] = k
        values[:, :, -1:] = v
        y = functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(h.shape))


class Decoder(nn.Module):
    """Embedding, layers, norm and lm_head: [batch, 1] token ids to [batch, 1, vocabulary]."""

    def __init__(self, shape: BlockShape, vocabulary: int, device: str = "cuda"):
        super().__init__()
        dtype = torch.bfloat16
        self.embedding = nn.Embedding(vocabulary, shape.hidden, device=device, dtype=dtype)
        self.layers = llama.decoder(shape, device)
        for layer in self.layers:
            layer.attention = CachedAttention(shape, device, dtype)
        self.norm = nn.RMSNorm(shape.hidden, device=device, dtype=dtype)
        self.lm_head = nn.Linear(shape.hidden, vocabulary, bias=False, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.layers(self.embedding(tokens))))
