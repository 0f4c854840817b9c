"""Matrix products on operands quantized beforehand: ours, accumulating, and torch._scaled_mm's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What quantizes the one operand, what the other; of blocks the pairs of fprop and of wgrad.
PAIRS = {
    "tensorwise": ("tensorwise", "tensorwise"),
    "rowwise": ("rowwise", "rowwise"),
    "1x128 · 128x128": ("blockwise_1x128", "blockwise_128x128"),
    "1x128 · 1x128": ("blockwise_1x128", "blockwise_1x128"),
}


def is_blocks(pair: str) -> bool:
    """Blocks know no fast accumulation."""
    return "128" in pair


def products(x: Tensor, weight: Tensor, pair: str, fast: bool) -> dict[str, Callable[[], Tensor]]:
    """x: [M, K], weight: [N, K], bf16. Calls without arguments, by the name of what they do.
    torch._scaled_mm has no blocks."""
    ops = torch.ops.fp8
    name = pair if fast else f"{pair}, split"
    (a, scale_a), (b, scale_b) = (
        getattr(ops, f"quantize_{how}")(operand)
        for how, operand in zip(PAIRS[pair], (x, weight), strict=True)
    )
    their_scale_b = scale_b.t().contiguous() if pair == "rowwise" else scale_b
    out = torch.zeros(x.shape[0], weight.shape[0], device=x.device)

    def theirs() -> Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a, their_scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    calls: dict[str, Callable[[], Tensor]] = {
        f"scaled_mm {name}": lambda: ops.scaled_mm(
            a, b, scale_a, scale_b, None, torch.bfloat16, fast
        ),
    }
    if not is_blocks(pair):
        calls[f"torch._scaled_mm {name}"] = theirs
    if not fast:
        calls[f"scaled_mm_accumulate_ {name}, fp32 out"] = lambda: ops.scaled_mm_accumulate_(
            out, a, b, scale_a, scale_b, fast
        )
    return calls
