"""The shapes that are measured, and the arithmetic of their floors."""

from __future__ import annotations

from typing import NamedTuple

from runs import import_fp8


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
RECIPES: tuple[str, ...] = tuple(import_fp8().RECIPES)
GROUPED_RECIPES: tuple[str, ...] = tuple(import_fp8().GROUPED_RECIPES)

# The layers that are compared with every peer.
MAIN_SHAPES = (
    LinearShape(8192, 4096, 4096),
    LinearShape(2048, 4096, 14336),
    LinearShape(8192, 4096, 14336),
    LinearShape(8192, 14336, 4096),
    LinearShape(8192, 8192, 28672),
)

# The two layers whose speed is measured over the number of tokens, M.
SWEEP_LAYERS = ((4096, 14336), (14336, 4096))
SWEEP_TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def main_shapes(quick: bool = False) -> list[LinearShape]:
    return [MAIN_SHAPES[2]] if quick else list(MAIN_SHAPES)


def sweep_shapes(quick: bool = False) -> list[LinearShape]:
    tokens = SWEEP_TOKENS[1::4] if quick else SWEEP_TOKENS
    return [LinearShape(m, k, n) for k, n in SWEEP_LAYERS for m in tokens]


# Rows of bf16 inputs, 8192 columns: 16, 64, 128 and 235 MB of input.
QUANTIZE_COLUMNS = 8192
QUANTIZE_ROWS = (1024, 4096, 8192, 14336)

# Fewest bytes an element of a 16-bit input costs, reads plus writes, in one or two passes.
QUANTIZE_BYTES = {
    "quantize_rowwise": 3,  # 2 read, 1 written
    "quantize_rowwise, power of two": 3,
    "quantize_rowwise_transpose": 6,  # columns' amax first: 2 read; then 2 read, 1 + 1 written
    "quantize_tensorwise": 5,  # amax: 2 read; then 2 read, 1 written
    "quantize_tensorwise, static scale": 3,
    "quantize_tensorwise_transpose": 6,
    "quantize_tensorwise_transpose, power of two": 6,
    "quantize_tensorwise_transpose, static scale": 4,
    "quantize_blockwise_1x128": 3,
    "quantize_blockwise_1x128_transpose": 4,  # one pass: 2 read, 1 + 1 written
    "quantize_blockwise_128x128": 3,
    "quantize_blockwise_128x128_transpose": 4,
    "dequantize": 3,  # 1 read, 2 written
}


class BlockShape(NamedTuple):
    """Decoder layers on [sequences, tokens, hidden], Llama 3 8B's by default."""

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

    @property
    def rows(self) -> int:
        """Tokens of all sequences: M of each linear layer."""
        return self.sequences * self.tokens


LLAMA_8B = BlockShape()
LLAMA_70B = BlockShape(hidden=8192, ffn=28672, heads=64, layers=1)


class DecoderCase(NamedTuple):
    """One decoder measurement. peers: names in peers.PEERS, besides bf16 and our recipes."""

    model: str
    shape: BlockShape
    peers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return case_name(self.model, self.shape.sequences, self.shape.tokens, self.shape.rotary)


def case_name(model: str, sequences: int, context: int, rotary: bool) -> str:
    return f"{model}, {sequences} × {context}" + ("" if rotary else ", no RoPE")


_TENSORWISE, _ROWWISE = "torchao tensorwise compiled", "torchao rowwise compiled"

# Every case has 8192 tokens. Compiling a decoder takes some twenty seconds, which is why only the
# first has every peer; the most telling cases come first, should the time budget end. The second
# has less of the elementwise work that no linear layer can speed up.
DECODER_CASES = (
    DecoderCase(
        "8B",
        LLAMA_8B,
        (
            *("bf16 compiled", _TENSORWISE, _ROWWISE, "torchao tensorwise eager"),
            *("TE delayed", "TE current"),
        ),
    ),
    DecoderCase("8B", LLAMA_8B._replace(rotary=False), (_TENSORWISE, _ROWWISE)),
    DecoderCase("8B", LLAMA_8B._replace(sequences=4, tokens=2048), (_TENSORWISE,)),
    DecoderCase("70B", LLAMA_70B, (_TENSORWISE,)),
    DecoderCase("70B", LLAMA_70B._replace(sequences=4, tokens=2048), (_TENSORWISE,)),
)


def decoder_cases(quick: bool = False) -> list[DecoderCase]:
    """quick: one 8B layer, nothing compiled."""
    if quick:
        return [DecoderCase("8B", LLAMA_8B._replace(layers=1))]
    return list(DECODER_CASES)


# Gradient accumulation: micro-batches between two optimizer steps, and their tokens.
MICRO_BATCHES = 4
MICRO_TOKENS = (2048, 4096)


class MoeShape(NamedTuple):
    """The experts of one layer, with the routing given."""

    model: str
    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int  # of an expert

    @property
    def rows(self) -> int:
        """Rows of the grouped matmuls."""
        return self.tokens * self.top_k

    def __str__(self) -> str:
        return f"{self.model}, {self.tokens} tokens"


MIXTRAL = MoeShape("Mixtral-8x7B", 8192, 8, 2, 4096, 14336)
QWEN3 = MoeShape("Qwen3-30B-A3B", 32768, 128, 8, 2048, 768)


def moe_shapes(quick: bool = False) -> list[MoeShape]:
    return [QWEN3._replace(tokens=4096)] if quick else [MIXTRAL, QWEN3, QWEN3._replace(tokens=4096)]
