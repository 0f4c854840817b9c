"""Quantize operators: bytes over time against a device copy of as many bytes in the same run.

quantize_tensorwise, quantize_rowwise, quantize_blockwise_1x128 and quantize_blockwise_128x128, each
with and without _transpose, and dequantize, bf16, at 16 to 235 MB of input. Bytes are the fewest
that the operator must move.

And the passes between the grouped products of moe_experts, by profile (passes.py), beside the pass
over the rows of a matrix that they are held against, at 67 to 940 MB of gates and ups;
and norms and rotary position embedding, by profile too (norms.py, ropes.py).
"""

from __future__ import annotations

import argparse
import sys

import merged_passes
import mlp_passes
import norms
import passes
import ropes
import tables
import timing
import torch
from runs import Row, import_fp8, main
from shapes import QUANTIZE_BYTES, QUANTIZE_COLUMNS, QUANTIZE_ROWS
from tqdm import tqdm


def calls(x: torch.Tensor):
    """Each operator as a call without arguments."""
    ops = torch.ops.fp8
    scale = torch.ones((), device=x.device)
    data, factors = ops.quantize_rowwise(x)
    transpose = ops.quantize_tensorwise_transpose
    return {
        "quantize_rowwise": lambda: ops.quantize_rowwise(x),
        "quantize_rowwise, power of two": lambda: ops.quantize_rowwise(x, power_of_two=True),
        "quantize_rowwise_transpose": lambda: ops.quantize_rowwise_transpose(x),
        "quantize_tensorwise": lambda: ops.quantize_tensorwise(x),
        "quantize_tensorwise, static scale": lambda: ops.quantize_tensorwise(x, scale=scale),
        "quantize_tensorwise_transpose": lambda: transpose(x),
        "quantize_tensorwise_transpose, power of two": lambda: transpose(x, power_of_two=True),
        "quantize_tensorwise_transpose, static scale": lambda: transpose(x, scale=scale),
        "quantize_blockwise_1x128": lambda: ops.quantize_blockwise_1x128(x),
        "quantize_blockwise_1x128_transpose": lambda: ops.quantize_blockwise_1x128_transpose(x),
        "quantize_blockwise_128x128": lambda: ops.quantize_blockwise_128x128(x),
        "quantize_blockwise_128x128_transpose": lambda: ops.quantize_blockwise_128x128_transpose(x),
        "dequantize": lambda: ops.dequantize(data, factors),
    }


def copies(elements: int) -> dict[int, object]:
    """For each number of bytes an element: a device copy that reads and writes as many in all."""
    found = {}
    for per_element in sorted(set(QUANTIZE_BYTES.values())):
        source = torch.randint(0, 127, (elements * per_element // 2,), device="cuda").to(torch.int8)
        target = torch.empty_like(source)
        found[per_element] = lambda s=source, t=target: t.copy_(s)
    return found


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    import_fp8()
    rows: list[Row] = []
    for m in tqdm(QUANTIZE_ROWS[:2] if options.quick else QUANTIZE_ROWS, unit="size"):
        x = torch.randn(m, QUANTIZE_COLUMNS, device="cuda", dtype=torch.bfloat16)
        variants = calls(x) | {f"copy {b}": run for b, run in copies(x.numel()).items()}
        times = timing.device_times(variants, 10 if options.quick else 20)
        for name, per_element in QUANTIZE_BYTES.items():
            moved = x.numel() * per_element
            rows.append(
                {
                    "op": name,
                    "m": m,
                    "k": QUANTIZE_COLUMNS,
                    "input_mb": x.numel() * 2 / 1e6,
                    "bytes_per_element": per_element,
                    "time_us": times[name].as_dict(),
                    "copy_us": times[f"copy {per_element}"].as_dict(),
                    "gb_per_s": moved / times[name].median / 1e3,
                    "of_copy": times[f"copy {per_element}"].median / times[name].median,
                }
            )
        del variants, x
        torch.cuda.empty_cache()
    quick = passes.INPUT_MB[:1] if options.quick else passes.INPUT_MB
    for kind in (passes, mlp_passes, merged_passes):
        rows += kind.measure(5, quick)
    for kind in (norms, ropes):
        rows += kind.measure(10, kind.SHAPES[:1] if options.quick else kind.SHAPES)
    return rows, {}


def table(rows: list[Row]) -> str:
    columns = ["operator", "input MB", "bytes/element", "us", "GB/s", "of copy"]
    lines = [
        [
            row["op"],
            f"{row['input_mb']:.0f}",
            row["bytes_per_element"],
            row["time_us"]["median"],
            row["gb_per_s"],
            f"{100 * row['of_copy']:.0f}%",
        ]
        for row in rows
    ]
    return tables.text(columns, lines)


if __name__ == "__main__":
    sys.exit(main("quantize", __doc__.splitlines()[0], measure, table))
