"""Layers of inference, weights in FP8 or not: a call of few rows, from a CUDA graph, cold L2.

    python benchmarks/bench_decode.py --quick
    FP8_DECODE=1 python benchmarks/bench_decode.py --quick  # up to 64 rows by the decode kernel

`frozen` has a weight that is FP8 (fp8.FrozenLinear's operator), `fused` quantizes it in each
replay, `product` is scaled_mm on operands that are ready: what quantizing x costs is the difference
to `frozen`. `bytes` of the weight over the time of a device copy is what a call could not beat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

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


def _graph(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A replay of it, and where its result lies."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph.replay, y


def variants(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    ops = torch.ops.fp8
    rows = ops.quantize_rowwise(weight)
    tensor = ops.quantize_tensorwise(weight)
    codes, squares = ops.quantize_blockwise_128x128(weight)
    blocks = (codes, squares.contiguous())
    static = x.abs().amax().float() / 448
    qx = ops.quantize_rowwise(x)
    return {
        "bf16": lambda: torch.nn.functional.linear(x, weight),
        "frozen rowwise": lambda: ops.linear_frozen(x, *rows),
        "frozen tensorwise, static": lambda: ops.linear_frozen(x, *tensor, None, static),
        "frozen blockwise": lambda: ops.linear_frozen(x, *blocks),
        "fused rowwise": lambda: ops.fused_linear(x, weight, None, "rowwise"),
        "product rowwise": lambda: ops.scaled_mm(qx[0], rows[0], qx[1], rows[1]),
    }


def measure_layer(m: int, k: int, n: int, repeats: int) -> list[Row]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    exact = x[:SQNR_ROWS].double() @ weight.double().t()
    calls = variants(x, weight)  # which have the operands, that replays read
    with torch.no_grad():
        graphs = {name: _graph(run) for name, run in calls.items()}
    times = timing.device_times({name: run for name, (run, _) in graphs.items()}, repeats)
    bound = copy_us(n * k, repeats) if m <= SQNR_ROWS else None
    return [
        {
            "m": m,
            "k": k,
            "n": n,
            "variant": name,
            "time_us": found.as_dict(),
            "speedup": times["bf16"].median / found.median,
            "of_weight_copy": None if bound is None else bound / found.median,
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
        for m in values:
            rows += measure_layer(m, k, n, 10 if options.quick else 20)
    return rows, {}


def table(rows: list[Row]) -> str:
    columns = ["M, K → N", "variant", "us", "x bf16", "of a copy of the codes", "SQNR dB"]
    lines = [
        [
            f"{row['m']}, {row['k']} → {row['n']}",
            row["variant"],
            row["time_us"]["median"],
            tables.ratio(row["speedup"]),
            None if row["of_weight_copy"] is None else tables.ratio(row["of_weight_copy"]),
            row["sqnr_db"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


if __name__ == "__main__":
    sys.exit(main("decode", __doc__.splitlines()[0], measure, table))
