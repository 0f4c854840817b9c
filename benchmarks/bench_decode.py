"""Layers of inference, weights in FP8 or not: a call of few rows, from a CUDA graph, cold L2.

    python benchmarks/bench_decode.py --quick

`frozen` has a weight that is FP8 (fp8.FrozenLinear's operator), few rows by the decode kernel,
or without it; `batch invariant` is inside fp8.batch_invariant(), and its price is its time over
that of the same layer outside. `fused` quantizes the weight in each replay, `product` is scaled_mm
on operands that are ready: what quantizing x costs is the difference to `frozen` without decode.
`bytes` of the weight over the time of a device copy is what a call could not beat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext

import tables
import timing
import torch
from passes import copy_us
from runs import Row, import_fp8, main
from torch import Tensor
from tqdm import tqdm

LAYERS = ((4096, 4096), (4096, 6144), (4096, 14336), (4096, 28672), (14336, 4096))  # K, N
M_VALUES = (1, 4, 8, 16, 32, 64, 8192)
SQNR_ROWS = 64
DECODE_ROWS = 64  # at most, by the kernel for few
INVARIANT = ", batch invariant"


def variants(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    fp8, ops = import_fp8(), torch.ops.fp8
    rows = ops.quantize_rowwise(weight)
    tensor = ops.quantize_tensorwise(weight)
    codes, squares = ops.quantize_blockwise_128x128(weight)
    blocks = (codes, squares.contiguous())
    static = x.abs().amax().float() / 448
    qx = ops.quantize_rowwise(x)
    operands = {
        "frozen rowwise": (x, *rows),
        "frozen tensorwise, static": (x, *tensor, None, static),
        "frozen blockwise": (x, *blocks),
    }

    def frozen(name: str, decode: bool = True, invariant: bool = False) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with fp8.batch_invariant() if invariant else nullcontext():
                return ops.linear_frozen(*operands[name], decode=decode)

        return call

    found = {"bf16": lambda: torch.nn.functional.linear(x, weight)}
    for name in operands:
        found[name] = frozen(name)
        if x.shape[0] <= DECODE_ROWS:
            found[f"{name}, decode=False"] = frozen(name, decode=False)
        found[name + INVARIANT] = frozen(name, invariant=True)
    return found | {
        "fused rowwise": lambda: ops.fused_linear(x, weight, None, "rowwise"),
        "product rowwise": lambda: ops.scaled_mm(qx[0], rows[0], qx[1], rows[1]),
    }


def measure_layer(m: int, k: int, n: int, repeats: int, copy: float) -> list[Row]:
    """copy: us of a device copy of the codes."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    exact = x[:SQNR_ROWS].double() @ weight.double().t()
    calls = variants(x, weight)  # which have the operands, that replays read
    with torch.no_grad():
        graphs = {name: timing.graph_of(run) for name, run in calls.items()}
    times = timing.device_times({name: run for name, (run, _) in graphs.items()}, repeats)
    bound = copy if m <= DECODE_ROWS else None
    return [
        {
            "m": m,
            "k": k,
            "n": n,
            "variant": name,
            "time_us": found.as_dict(),
            "speedup": times["bf16"].median / found.median,
            "of_weight_copy": None if bound is None else bound / found.median,
            "price": found.median / times[name.removesuffix(INVARIANT)].median
            if name.endswith(INVARIANT)
            else None,
            "sqnr_db": timing.sqnr(graphs[name][1][:SQNR_ROWS], exact),
        }
        for name, found in times.items()
    ]


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    import_fp8()
    layers = LAYERS[:1] if options.quick else LAYERS
    values = M_VALUES[:2] if options.quick else M_VALUES
    rows: list[Row] = []
    for k, n in tqdm(layers, unit="layer"):
        repeats = 10 if options.quick else 20
        copy = copy_us(n * k, repeats)
        for m in values:
            rows += measure_layer(m, k, n, repeats, copy)
        options.save(rows, {})
    return rows, {}


def table(rows: list[Row]) -> str:
    columns = ["M, K → N", "variant", "us", "x bf16", "of a copy of the codes", "price", "SQNR dB"]
    lines = [
        [
            f"{row['m']}, {row['k']} → {row['n']}",
            row["variant"],
            row["time_us"]["median"],
            tables.ratio(row["speedup"]),
            None if row["of_weight_copy"] is None else tables.ratio(row["of_weight_copy"]),
            None if row["price"] is None else tables.ratio(row["price"]),
            row["sqnr_db"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


if __name__ == "__main__":
    sys.exit(main("decode", __doc__.splitlines()[0], measure, table))
