"""The sections about inference, from the rows of bench_generate.py and bench_decode.py."""

from __future__ import annotations

import tables
from bench_decode import DECODE_ROWS, INVARIANT
from runs import Row


def generate(rows: list[Row]) -> str:
    def cell(row: Row) -> str:
        milliseconds = tables.cell(row["step_us"]["median"] / 1e3)
        return f"{milliseconds} ms ({tables.ratio(row['speedup'])}), {row['weights_gib']:.1f} GiB"

    return (
        "A decode step of a whole model, one token of each sequence: time (speed against bf16 in a "
        "CUDA graph), and memory of all weights, of which embedding and `lm_head` are bf16 "
        'everywhere. "graph": a replay of the step; else eager, which the host bounds. fp8 is '
        "`fp8.freeze`; decode=False is without the kernel for few rows; batch invariant inside "
        "`fp8.batch_invariant`. Random weights. Columns: model, layers, sequences × context.\n\n"
    ) + tables.pivot(
        "step, weights",
        rows,
        lambda row: row["variant"],
        lambda row: f"{row['model']}, {row['layers']} layers, {row['batch']} × {row['context']}",
        cell,
    )


def decode(rows: list[Row]) -> str:
    """Without the operators below the layer, which the JSON has."""

    def layer(row: Row) -> str:
        return f"{row['k']} → {row['n']}, {row['variant']}"

    def tokens(row: Row) -> str:
        return f"M {row['m']}"

    def cell(row: Row) -> str:
        time = tables.cell(row["time_us"]["median"])
        return time if row["variant"] == "bf16" else f"{time} ({tables.ratio(row['speedup'])})"

    few = [row for row in rows if row["m"] <= DECODE_ROWS]
    named = [row for row in few if row["variant"].startswith(("bf16", "frozen"))]
    priced = [row for row in rows if row["price"] is not None]
    speeds = tables.pivot(
        "K → N",
        [row for row in named if not row["variant"].endswith(INVARIANT)],
        layer,
        tokens,
        cell,
    )
    prices = tables.pivot(
        "K → N",
        priced,
        lambda row: layer(row).removesuffix(INVARIANT),
        tokens,
        lambda row: tables.ratio(row["price"]),
    )
    return (
        "A frozen layer (`fp8.FrozenLinear`) of few rows, x quantized in the call: us a replay of "
        "a CUDA graph of the layer alone, over weights that are cold (speed against bf16). "
        f"decode=False: by cuBLASLt.\n\n{speeds}\n\nWhat `fp8.batch_invariant` costs: the time "
        f"inside it over that of the same layer outside.\n\n{prices}"
    )
