"""scaled_mm and scaled_mm_accumulate_ against torch._scaled_mm and the bf16 product."""

from __future__ import annotations

import argparse
import sys

import operands_gpu
import tables
import timing
import torch
from runs import Row, import_fp8, main
from shapes import LAYERS, LinearShape
from tqdm import tqdm

M_VALUES = (16, 256, 2048, 8192)


def measure_shape(shape: LinearShape, repeats: int) -> list[Row]:
    m, k, n = shape
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    exact = x[:64].double() @ weight.double().t()
    variants = {"bf16": lambda: torch.nn.functional.linear(x, weight)}
    for pair in operands_gpu.PAIRS:
        for fast in (False,) if operands_gpu.is_blocks(pair) else (True, False):
            variants |= operands_gpu.products(x, weight, pair, fast)
    noise = {
        name: timing.sqnr(run()[:64], exact)
        for name, run in variants.items()
        if "accumulate" not in name
    }
    times = timing.device_times(variants, repeats)
    return [
        shape._asdict()
        | {
            "variant": name,
            "time_us": found.as_dict(),
            "tflops": shape.flops / found.median / 1e6,
            "speedup": times["bf16"].median / found.median,
            "sqnr_db": noise.get(name),
        }
        for name, found in times.items()
    ]


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    import_fp8()
    values = M_VALUES[-1:] if options.quick else M_VALUES
    layers = LAYERS[:2] if options.quick else LAYERS[:3]
    rows: list[Row] = []
    for k, n in tqdm(layers, unit="layer"):
        for m in values:
            rows += measure_shape(LinearShape(m, k, n), 10 if options.quick else 15)
    return rows, {}


def table(rows: list[Row]) -> str:
    columns = ["M, K → N", "variant", "us", "TFLOP/s", "x bf16", "SQNR dB"]
    lines = [
        [
            f"{row['m']}, {row['k']} → {row['n']}",
            row["variant"],
            row["time_us"]["median"],
            row["tflops"],
            tables.ratio(row["speedup"]),
            row["sqnr_db"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


if __name__ == "__main__":
    sys.exit(main("matmul", __doc__.splitlines()[0], measure, table))
