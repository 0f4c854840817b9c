"""grouped_mm against ATen's grouped products in bf16 and FP8, a loop of scaled_mm, one scaled_mm.

The three products of a layer of experts, y = x Wᵀ, dx = dy W, dW = dyᵀ x, on operands that exist
already. "loop" multiplies expert by expert, with extents that the host knows; "one weight" is a
single dense product of as many operations, which no grouped one can be expected to beat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import tables
import timing
import torch
from moe_layer import bf16_product, fp8_product, quantized
from runs import Row, import_fp8, main
from torch import Tensor
from tqdm import tqdm

BF16 = torch.bfloat16
UNIT = 32  # extents of groups: what every kernel here takes, in columns too


class Case(NamedTuple):
    name: str
    experts: int
    k: int
    n: int
    rows: int
    routing: str = "even"

    def counts(self) -> list[int]:
        """Rows of each expert. zipf: as 1 / (rank + 4), and one expert in seven has none. half: one
        expert has half of the rows, every second one none."""
        weights = [1.0] * self.experts
        if self.routing == "zipf":
            ranks = (i * 37 % self.experts for i in range(self.experts))
            weights = [0.0 if i % 7 == 3 else 1 / (rank + 4) for i, rank in enumerate(ranks)]
        elif self.routing == "half":
            weights = [1.0 if i % 2 == 0 else 0.0 for i in range(self.experts)]
            weights[self.experts // 3] = sum(weights)
        total = sum(weights)
        found = [int(self.rows * weight / total) // UNIT * UNIT for weight in weights]
        found[0] += (self.rows - sum(found)) // UNIT * UNIT
        return found


CASES = (
    Case("Mixtral gate_up", 8, 4096, 28672, 16384),
    Case("Mixtral down", 8, 14336, 4096, 16384),
    Case("Mixtral gate_up", 8, 4096, 28672, 4096),
    Case("Qwen3-30B gate_up", 128, 2048, 1536, 65536),
    Case("Qwen3-30B gate_up", 128, 2048, 1536, 65536, "zipf"),
    Case("Qwen3-30B gate_up", 128, 2048, 1536, 65536, "half"),
    Case("Qwen3-30B down", 128, 768, 2048, 65536),
    Case("32 experts", 32, 7168, 4096, 32768),
    Case("Qwen3-30B gate_up", 128, 2048, 1536, 16384),
    Case("Qwen3-30B gate_up", 128, 2048, 1536, 16384, "zipf"),
    Case("Qwen3-30B gate_up", 128, 2048, 1536, 16384, "half"),
)
Variants = dict[str, Callable[[], Tensor]]


def rows_variants(counts: list[int], n: int, k: int) -> Variants:
    """out[r] = a[r] b[g]ᵀ: fprop, and dgrad with the weight transposed beforehand."""
    ops = torch.ops.fp8
    ends = torch.tensor(counts, device="cuda").cumsum(0).int()
    x = torch.randn(sum(counts), k, device="cuda", dtype=BF16)
    weight = torch.randn(len(counts), n, k, device="cuda", dtype=BF16)
    (a, scale_a), (b, scale_b) = quantized(x), quantized(weight)
    row_scales = scale_a[:, None], scale_b[..., None]
    blocks_a, square_a = ops.quantize_blockwise_1x128(x)
    blocks_b, square_b = ops.quantize_blockwise_128x128(weight.view(-1, k))
    square_b = square_b.unflatten(0, (len(counts), -1))
    blocks_b = blocks_b.view_as(weight)
    parts = list(zip(x.split(counts), a.split(counts), row_scales[0].split(counts), strict=True))

    def loop() -> Tensor:
        for g, (_, part, scale) in enumerate(parts):
            if part.shape[0] > 0:
                out = ops.scaled_mm(part, b[g], scale, row_scales[1][g])
        return out

    return {
        "bf16": bf16_product(x, weight.transpose(1, 2), ends),
        "ATen fast": fp8_product((a, scale_a), (b, scale_b), ends, True),
        "ATen split": fp8_product((a, scale_a), (b, scale_b), ends, False),
        "fast": lambda: ops.grouped_mm(a, b, *row_scales, ends),
        "split": lambda: ops.grouped_mm(a, b, *row_scales, ends, BF16, False),
        "blockwise": lambda: ops.grouped_mm(blocks_a, blocks_b, square_a, square_b, ends),
        "loop": loop,
        "one weight": lambda: ops.scaled_mm(a, b[0], row_scales[0], row_scales[1][0]),
    }


def columns_variants(counts: list[int], m: int, n: int) -> Variants:
    """out[g] = a[:, g] b[:, g]ᵀ: wgrad. An expert without tokens has 32 columns of zeros."""
    ops = torch.ops.fp8
    padded = [max(count, UNIT) for count in counts]
    ends = torch.tensor(padded, device="cuda").cumsum(0).int()
    x, y = (torch.randn(sum(padded), extent, device="cuda", dtype=BF16) for extent in (m, n))
    a, b = (quantized(t.t().contiguous())[0] for t in (x, y))
    scales = [torch.full((len(counts), extent), 2.0**-6, device="cuda") for extent in (m, n)]
    flat = [scale.view(-1) for scale in scales]

    def loop() -> Tensor:
        begin = 0
        for g, count in enumerate(padded):
            part = [t[:, begin : begin + count] for t in (a, b)]
            out = ops.scaled_mm(*part, scales[0][g][:, None], scales[1][g][:, None])
            begin += count
        return out

    return {
        "bf16": bf16_product(x.t(), y, ends),
        "ATen fast": fp8_product((a, flat[0]), (b, flat[1]), ends, True),
        "ATen split": fp8_product((a, flat[0]), (b, flat[1]), ends, False),
        "fast": lambda: ops.grouped_mm(a, b, *scales, ends),
        "split": lambda: ops.grouped_mm(a, b, *scales, ends, BF16, False),
        "loop": loop,
    }


def measure_case(case: Case, repeats: int) -> list[Row]:
    counts = case.counts()
    found: list[Row] = []
    products = {
        "fprop": lambda: rows_variants(counts, case.n, case.k),
        "dgrad": lambda: rows_variants(counts, case.k, case.n),
        "wgrad": lambda: columns_variants(counts, case.n, case.k),
    }
    for product, make in products.items():
        variants = make()
        if case.experts > 32:
            del variants["loop"]  # 30 us of the host's time for each expert: out of the question
        flops = 2 * sum(counts) * case.k * case.n
        times = timing.device_times(variants, repeats)
        for name, time in times.items():
            found.append(
                {
                    **case._asdict(),
                    "product": product,
                    "variant": name,
                    "time_us": time.as_dict(),
                    "tflops": flops / time.median / 1e6,
                    "speedup": times["bf16"].median / time.median,
                }
            )
    return found


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    import_fp8()
    cases = CASES[3:4] if options.quick else CASES
    rows: list[Row] = []
    for case in tqdm(cases, unit="case"):
        rows += measure_case(case, 8 if options.quick else 10)
    return rows, {}


def table(rows: list[Row]) -> str:
    """A line for each product, a column for each variant: us (TFLOP/s)."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        what = f"{row['name']}: {row['experts']} x {row['k']} → {row['n']}, {row['rows']} rows"
        key = (what if row["routing"] == "even" else f"{what}, {row['routing']}", row["product"])
        lines.setdefault(key, {})[row["variant"]] = row
    cells = [
        [
            *key,
            *(
                f"{found[name]['time_us']['median']:.0f} ({found[name]['tflops']:.0f})"
                if name in found
                else "–"
                for name in names
            ),
        ]
        for key, found in lines.items()
    ]
    return tables.text(["layer", "product", *names], cells, left=2)


if __name__ == "__main__":
    sys.exit(main("grouped", __doc__.splitlines()[0], measure, table))
