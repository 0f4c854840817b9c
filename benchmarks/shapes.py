"""The shapes that are measured, and the arithmetic of their floors."""

from __future__ import annotations

from typing import NamedTuple


class LinearShape(NamedTuple):
    """y[M, N] = x[M, K] · W[N, K]ᵀ."""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Of one of the three matrix products."""
        return 2 * self.m * self.k * self.n

    def __str__(self) -> str:
        return f"{self.m}, {self.k} → {self.n}"


LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))  # (K, N) of Llama 3 8B and 70B
TOKENS = (2048, 8192)
RECIPES = ("tensorwise", "rowwise", "rowwise_gw_hp")


def linear_shapes(quick: bool = False) -> list[LinearShape]:
    if quick:
        return [LinearShape(8192, k, n) for k, n in ((4096, 14336), (14336, 4096))]
    return [LinearShape(m, k, n) for k, n in LAYERS for m in TOKENS]


# Rows of bf16 inputs, 8192 columns: 16, 64, 128 and 235 MB of input.
QUANTIZE_COLUMNS = 8192
QUANTIZE_ROWS = (1024, 4096, 8192, 14336)

# Fewest bytes an element of a 16-bit input costs, reads plus writes, in one or two passes.
QUANTIZE_BYTES = {
    "quantize_rowwise": 3,  # 2 read, 1 written
    "quantize_rowwise_transpose": 6,  # columns' amax first: 2 read; then 2 read, 1 + 1 written
    "quantize_tensorwise": 5,  # amax: 2 read; then 2 read, 1 written
    "quantize_tensorwise_transpose": 6,
    "quantize_tensorwise_transpose, static scale": 4,
    "dequantize": 3,  # 1 read, 2 written
}


class BlockShape(NamedTuple):
    """A decoder layer, Llama 3 8B's by default."""

    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 2
    sequences: int = 2
    tokens: int = 4096
    rotary: bool = True  # False: without the position embedding

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads
