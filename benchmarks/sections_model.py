"""The section about whole training steps, from bench_model.py's rows."""

from __future__ import annotations

import kernel_times
import tables
from model_cases import case_name
from model_variants import BESIDE, LAST
from runs import Row


def shown(rows: list[Row]) -> list[Row]:
    """Without bf16 measured again, which only says how far the ratios are to be trusted."""
    return [row for row in rows if row["variant"] not in (BESIDE, LAST)]


def drift(rows: list[Row]) -> float:
    """The largest difference of bf16 measured again to bf16, 0.01 for 1%."""
    changes = [abs(1 / row["speedup"] - 1) for row in rows if row["variant"] == LAST]
    first = {case_name(row): row for row in rows if row["variant"] == "bf16"}
    for row in rows:
        if row["variant"] == BESIDE and case_name(row) in first:
            base = first[case_name(row)]["step_us"]["median"]
            changes.append(abs(row["step_us"]["median"] / base - 1))
    return max(changes, default=0.0)


def speeds(rows: list[Row]) -> str:
    return tables.pivot(
        "speed / memory",
        shown(rows),
        lambda row: row["variant"],
        case_name,
        lambda row: tables.speed_and_memory(row, row["step_us"]["median"]),
    )


def landing(rows: list[Row]) -> str:
    """For the README: steps alone, in as few words as the table needs."""
    steps = [row for row in rows if row["part"] == "step"]
    return (
        "A training step of transformers' models: forward with loss, backward, AdamW. Speed and "
        "peak memory as multiples of bf16 in eager mode, whose milliseconds and GiB are given. fp8 "
        'is in eager mode too; "compiled" is torch.compile of each decoder layer. Columns: model, '
        f"layers, sequences × context.\n\n{speeds(steps)}"
    )


def section(rows: list[Row]) -> str:
    text = (
        "Training steps of transformers' models: forward with loss, backward, fused AdamW, with "
        "random weights in bf16, a vocabulary of 16384, sdpa attention and experts by "
        '`grouped_mm`; "one layer" is a decoder layer\'s forward + backward alone. Speed and peak '
        "memory as multiples of bf16 in eager mode, whose milliseconds and GiB are given. "
        '"compiled": each decoder layer for itself. bf16 measured again differs by at most '
        f"{100 * drift(rows):.1f}%.\n\n{speeds(rows)}"
    )
    profiled = [row for row in rows if row["profile"]]
    return f"{text}\n\n{kinds(profiled)}" if profiled else text


def two_gpus(rows: list[Row]) -> str:
    text = (
        "The step of "
        f"{case_name(rows[0])} on each of {rows[0]['gpus']} GPUs under FSDP2, every decoder layer "
        "a group: fp32 parameters in shards, gathered in bf16. Speed and peak memory as multiples "
        "of bf16 in eager mode; bf16 measured again differs by "
        f"{100 * drift(rows):.1f}%.\n\n"
    )
    return text + speeds(rows)


def kinds(rows: list[Row]) -> str:
    lines = [
        [
            case_name(row),
            row["variant"],
            *(row["profile"][f"{kind}_us"] / 1e3 for kind in kernel_times.KINDS),
            f"{100 * row['profile']['rest_share']:.0f}%",
            row["profile"]["kernels"],
        ]
        for row in rows
    ]
    columns = ["case", "variant", *kernel_times.KINDS, "share of rest", "kernels"]
    return (
        "Kernels of one step by kind, ms, under the profiler. Rest: what is neither a matrix "
        "product, attention, a kernel of fp8 nor the optimizer's.\n\n"
    ) + tables.markdown(columns, lines, left=2)
