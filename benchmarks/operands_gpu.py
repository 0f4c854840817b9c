"""Matrix products on operands quantized beforehand: ours, accumulating, and torch._scaled_mm's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def products(
    x: Tensor, weight: Tensor, granularity: str, fast: bool, name: str
) -> dict[str, Callable[[], Tensor]]:
    """x: [M, K], weight: [N, K], bf16. Calls without arguments, named after `name`."""
    ops = torch.ops.fp8
    quantize = getattr(ops, f"quantize_{granularity}")
    (a, scale_a), (b, scale_b) = quantize(x), quantize(weight)
    their_scale_b = scale_b.t().contiguous() if granularity == "rowwise" else scale_b
    out = torch.zeros(x.shape[0], weight.shape[0], device=x.device)

    def theirs() -> Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a, their_scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    calls: dict[str, Callable[[], Tensor]] = {
        f"scaled_mm {name}": lambda: ops.scaled_mm(
            a, b, scale_a, scale_b, None, torch.bfloat16, fast
        ),
        f"torch._scaled_mm {name}": theirs,
    }
    if not fast:
        calls[f"scaled_mm_accumulate_ {name}, fp32 out"] = lambda: ops.scaled_mm_accumulate_(
            out, a, b, scale_a, scale_b, fast
        )
    return calls
