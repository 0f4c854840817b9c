"""Tables of benchmark runs in Markdown: for each GPU that was measured a section of each benchmark.

documents.py says on which page they stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bench_block
import sections_inference
import sections_model
import tables
from runs import Row
from tables import pivot, speed_and_memory

TITLES = {
    "model": "Whole training steps",
    "fsdp": "Two GPUs",
    "block": "Decoder layers",
    "moe": "Experts",
    "experts": "Experts at inference",
    "grouped": "Grouped products",
    "linear": "Single layers",
    "generate": "One token of a whole model",
    "decode": "Layers of few tokens",
    "accumulate": "Gradient accumulation",
    "breakdown": "Where the time goes",
    "quantize": "Quantize operators",
    "sizes": "From which size on",
    "host": "Host time",
}
PLOTS = {
    "model": "Training steps against bf16",
    "linear": "Speed of one layer over M",
    "breakdown": "Where a step's time goes",
}


def describe(facts: Row) -> str:
    tuned = ", fp8.autotune" if facts.get("autotuned") else ""
    tuned += ", a run that was not finished" if facts.get("unfinished") else ""
    return (
        f"{facts['gpu']}, driver {facts['driver']}, CUDA {facts['cuda']}, torch {facts['torch']}, "
        f"cuBLASLt {facts['cublaslt']}{tuned}, commit {facts['commit'] or 'unknown'}"
    )


def source(name: str, run: Row) -> str:
    """The line below a table: where it was measured, and of what."""
    return f"<sub>{describe(run['header'])}; `benchmarks/results/{name}.json`</sub>"


def landing(runs: dict[str, Row]) -> str:
    """Whole training steps alone."""
    parts = []
    for name, run in runs.items():
        if run["benchmark"] == "model":
            parts += [sections_model.landing(run["rows"]), source(name, run)]
    return "\n\n".join(parts) if parts else "No results yet: run `make bench` on a GPU."


def everything(runs: dict[str, Row], folder: Path) -> str:
    """All sections. folder: of the JSON, where plots are looked for."""
    gpus = dict.fromkeys(run["header"]["gpu"] for run in runs.values())
    parts = []
    for gpu in gpus:
        of_gpu = {n: run for n, run in runs.items() if run["header"]["gpu"] == gpu}
        by_benchmark = {run["benchmark"]: (n, run) for n, run in of_gpu.items()}
        shown = [by_benchmark[b] for b in SECTIONS if b in by_benchmark]
        if shown:
            parts.append(f"### {gpu}")
        for name, run in shown:
            parts.append(f"#### {TITLES[run['benchmark']]}")
            parts.append(SECTIONS[run["benchmark"]](run["rows"]))
            if run["benchmark"] in PLOTS and (folder / f"{name}.png").exists():
                link = f"../benchmarks/results/{name}.png"
                parts.append(f"![{PLOTS[run['benchmark']]}, {gpu}]({link})")
            parts.append(source(name, run))
    return "\n\n".join(parts) if parts else "No results yet: run `make bench` on a GPU."


def block(rows: list[Row]) -> str:
    layers = dict.fromkeys(f"{row['layers']} of {row['model']}" for row in rows)
    return (
        "Llama 3 decoder layers, forward + backward, attention and norms included: speed and peak "
        "memory as multiples of bf16, whose milliseconds and GiB are given. Columns: model, "
        f"sequences × context. Layers: {', '.join(layers)}.\n\n"
    ) + pivot(
        "speed / memory",
        rows,
        lambda row: row["variant"],
        bench_block.case_of,
        lambda row: speed_and_memory(row, row["step_us"]["median"]),
    )


def moe(rows: list[Row]) -> str:
    shapes = "; ".join(
        dict.fromkeys(
            f"{row['model']}: {row['experts']} experts, {row['hidden']} → {row['inner']}, top "
            f"{row['top_k']}"
            for row in rows
        )
    )

    def cell(row: Row) -> str:
        if row["variant"] == "bf16":
            step, forward = (row[what]["median"] / 1e3 for what in ("step_us", "forward_us"))
            return f"{tables.cell(step)} / {tables.cell(forward)} ms / {row['peak_gib']:.1f} GiB"
        speeds = [tables.ratio(row[f"{what}_speedup"]) for what in ("step", "forward")]
        peak = [tables.ratio(row["peak_ratio"])] if row["peak_ratio"] is not None else []
        return " / ".join([*speeds, *peak])

    return (
        "Experts of one layer of a mixture, against transformers' `grouped_mm` in bf16: forward + "
        "backward, forward alone (fp8 inside `fp8.cached_weights`), peak memory of the former. "
        f"{shapes}.\n\n"
    ) + pivot(
        "step / forward / memory",
        rows,
        lambda row: row["variant"],
        lambda row: f"{row['model']}, {row['tokens']} tokens",
        cell,
    )


def experts(rows: list[Row]) -> str:
    def case(row: Row) -> str:
        return f"{row['mixture']}, {row['tokens']} ({row['experts_used']})"

    def cell(row: Row) -> str:
        time = tables.cell(row["time_us"]["median"])
        if row["variant"] == "bf16":
            return f"{time} us"
        bound = row["of_weight_copy"] if row["variant"].startswith("frozen") else None
        return tables.ratio(row["speedup"]) + ("" if bound is None else f" / {100 * bound:.0f}%")

    return (
        "Experts of one layer, forward alone, in a CUDA graph over weights that are cold: speed "
        "against bf16 as transformers composes it. Frozen: weights that are FP8; fused: quantized "
        "in each call; bf16 products: the two products alone, of rows that are sorted. Beside it, "
        "of few tokens: speed as % of a device copy of the codes of the experts that have tokens. "
        "Columns: mixture, tokens (experts that have some).\n\n"
    ) + pivot(
        "speed / of a copy",
        rows,
        lambda row: row["variant"],
        case,
        cell,
    )


def grouped(rows: list[Row]) -> str:
    """Without the ceilings, which the JSON has."""
    names = {"bf16": "bf16", "ATen fast": "ATen", "ATen split": "ATen, split"}
    names |= {"fast": "fp8", "split": "fp8, split", "blockwise": "fp8, blocks"}

    def layer(row: Row) -> str:
        routing = "" if row["routing"] == "even" else f", {row['routing']}"
        what = f"{row['name']}, {row['experts']} x {row['k']} → {row['n']}, {row['rows']} rows"
        return f"{what}{routing}, {row['product']}"

    def cell(row: Row) -> str:
        return f"{row['time_us']['median']:.0f} ({row['tflops']:.0f})"

    return (
        "Products of groups of rows, us (TFLOP/s): torch's in bf16 and in FP8 with scales of rows, "
        "fp8's with the same scales and in blocks. Split: sums are promoted to fp32 every 128 "
        "elements. zipf, half: unlike groups.\n\n"
    ) + pivot(
        "product",
        [row for row in rows if row["variant"] in names],
        layer,
        lambda row: names[row["variant"]],
        cell,
    )


def linear(rows: list[Row]) -> str:
    """The step's speed against bf16, without the peers' slower forms (which the JSON has)."""

    def wanted(row: Row) -> bool:
        variant = row["variant"]
        slow = variant == "GEMMs alone, rowwise" or variant.endswith(" eager")
        return row["sweep"] == "main" and not slow

    def cell(row: Row) -> str:
        if row["variant"] == "bf16":
            return f"{tables.cell(row['step_us']['median'] / 1e3)} ms"
        return tables.ratio(row["step_speedup"])

    return "One linear layer, forward + backward: speed against bf16.\n\n" + pivot(
        "M, K → N",
        [row for row in rows if wanted(row)],
        lambda row: f"{row['m']}, {row['k']} → {row['n']}",
        lambda row: row["variant"],
        cell,
    )


def accumulate(rows: list[Row]) -> str:
    count = rows[0]["micro_batches"]
    return (
        f"Gradient accumulation over {count} micro-batches, two 8B layers, with and without "
        "`fp8.cached_weights` around them. Milliseconds are of one micro-batch; columns: its "
        "sequences × context.\n\n"
    ) + pivot(
        "speed / memory",
        rows,
        lambda row: row["variant"],
        lambda row: f"{row['sequences']} × {row['context']}",
        lambda row: speed_and_memory(row, row["micro_us"]),
    )


def breakdown(rows: list[Row]) -> str:
    """The plot says it all; this is its caption."""
    names = ", ".join(dict.fromkeys(row["variant"] for row in rows))
    return (
        f"Where a step's time goes on the GPU, by class of kernels: {names}. Rest: gaps between "
        "kernels, and that a GPU without pauses runs them at lower clocks than under the profiler."
    )


def quantize(rows: list[Row]) -> str:
    return "Quantize operators: speed as % of a device copy of as many bytes.\n\n" + pivot(
        "input",
        rows,
        lambda row: row["op"],
        lambda row: f"{row['input_mb']:.0f} MB",
        lambda row: f"{100 * row['of_copy']:.0f}%",
    )


def sizes(rows: list[Row]) -> str:
    """Of tensorwise: the other recipes are in the JSON."""
    shown = [row for row in rows if row["variant"] == "fp8 tensorwise"]
    return (
        "From which size on a layer gains: forward + backward of one layer alone, tensorwise: "
        "speed against bf16. Columns: tokens a step; size: millions of weight elements.\n\n"
    ) + pivot(
        "K → N (size)",
        sorted(shown, key=lambda row: (row["m"], row["k"] * row["n"], row["k"])),
        lambda row: f"{row['k']} → {row['n']} ({row['k'] * row['n'] / 1e6:.1f})",
        lambda row: f"{row['m']} tokens",
        lambda row: tables.ratio(row["step_speedup"]),
    )


def host(rows: list[Row]) -> str:
    return (
        "Host time of forward + backward, Linear(256, 256) on 16 tokens, and its ratio to "
        "`nn.Linear`.\n\n"
    ) + pivot(
        "host µs",
        rows,
        lambda row: row["variant"],
        lambda row: "with bias" if row["bias"] else "without bias",
        lambda row: f"{row['step_us']['median']:.0f} ({tables.ratio(row['step_ratio'])})",
    )


# In the order of the page.
SECTIONS: dict[str, Callable[[list[Row]], str]] = {
    "model": sections_model.section,
    "fsdp": sections_model.two_gpus,
    "block": block,
    "moe": moe,
    "experts": experts,
    "grouped": grouped,
    "linear": linear,
    "generate": sections_inference.generate,
    "decode": sections_inference.decode,
    "accumulate": accumulate,
    "breakdown": breakdown,
    "quantize": quantize,
    "sizes": sizes,
    "host": host,
}
