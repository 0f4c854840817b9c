"""Compares fp8::scaled_mm with torch._scaled_mm bit by bit on the GPU; prints one JSON object.

Run as a program with CUBLASLT_WORKSPACE_SIZE=32768 (KiB), which torch reads once: with another
workspace the heuristic may choose another algorithm, and so another order of summation. Each case
reports the number of elements whose bits differ and whether our result lies within the bound.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (0, 1)]
if not find_spec("fp8"):
    sys.path.append(str(Path(__file__).parents[3] / "python"))

import bounds  # noqa: E402
import operands  # noqa: E402
from reference import E4M3, E5M2  # noqa: E402

import fp8  # noqa: E402, F401  (registers the operators)

SHAPES = [
    (128, 256, 512),
    (1024, 1024, 1024),
    (17, 4096, 4096),
    (2048, 4096, 4096),
    (4096, 4096, 14336),
]


def compare(
    m: int, n: int, k: int, granularity: str, fast_accum: bool, with_bias: bool, a_dtype
) -> dict:
    data = operands.make(m, n, k, granularity, "cuda", a_dtype, E4M3)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16) if with_bias else None
    scale_b = data.scale_b.t().contiguous() if granularity == "rowwise" else data.scale_b
    args = (data.a, data.b.t(), data.scale_a, scale_b)
    options = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": fast_accum}
    theirs = torch._scaled_mm(*args, **options)
    ours = torch.ops.fp8.scaled_mm(*data, bias, torch.bfloat16, fast_accum)
    expected = bounds.product(*data, bias)
    allowed = bounds.bound(expected, torch.bfloat16, "fast" if fast_accum else "split")
    return {
        "case": f"{m}x{n}x{k} {granularity} {'fast' if fast_accum else 'split'}"
        f"{' bias' if with_bias else ''} {'e5m2' if a_dtype == E5M2 else 'e4m3'}",
        "different": int((ours.view(torch.int16) != theirs.view(torch.int16)).sum()),
        "elements": ours.numel(),
        "within": bool(((ours.double() - expected.exact).abs() <= allowed).all()),
    }


def main() -> None:
    torch.manual_seed(0)
    cases = [
        compare(*shape, granularity, fast_accum, with_bias, a_dtype)
        for shape in SHAPES
        for granularity in ("tensorwise", "rowwise")
        for fast_accum, with_bias, a_dtype in (
            (True, False, E4M3),
            (True, True, E4M3),
            (False, False, E4M3),
            (False, False, E5M2),
        )
    ]
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()
