"""README.md's tables of benchmark runs, in Markdown: for each GPU that was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bench_block
import readme_model
import status
import tables
from runs import ROOT, Row, import_fp8
from tables import pivot, speed_and_memory

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
CHECKS = ("<!-- checks:begin -->", "<!-- checks:end -->")
RECIPES = ("<!-- recipes:begin -->", "<!-- recipes:end -->")
PLOTS = {
    "model": "Training steps against bf16",
    "linear": "Speed of one layer over M",
    "breakdown": "Where a step's time goes",
}


def replace_between(document: str, table: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """The document with `table` between the markers. Raises ValueError when they are missing."""
    first, last = markers
    head, begin, rest = document.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the document lacks the lines {first} and {last}")
    return f"{head}{first}\n{table}\n{last}{tail}"


def describe(facts: Row) -> str:
    tuned = ", fp8.autotune" if facts.get("autotuned") else ""
    tuned += ", a run that was not finished" if facts.get("unfinished") else ""
    return (
        f"{facts['gpu']}, driver {facts['driver']}, CUDA {facts['cuda']}, torch {facts['torch']}, "
        f"cuBLASLt {facts['cublaslt']}{tuned}, commit {facts['commit'] or 'unknown'}"
    )


def sections(runs: dict[str, Row], folder: Path) -> str:
    """All of it. folder: of the JSON, where plots are looked for."""
    gpus = dict.fromkeys(run["header"]["gpu"] for run in runs.values())
    parts = []
    for gpu in gpus:
        of_gpu = {n: run for n, run in runs.items() if run["header"]["gpu"] == gpu}
        by_benchmark = {run["benchmark"]: (n, run) for n, run in of_gpu.items()}
        shown = [by_benchmark[b] for b in SECTIONS if b in by_benchmark]
        if shown:
            parts.append(f"### {gpu}")
        for name, run in shown:
            parts.append(SECTIONS[run["benchmark"]](run["rows"]))
            if run["benchmark"] in PLOTS and (folder / f"{name}.png").exists():
                link = f"benchmarks/results/{name}.png"
                parts.append(f"![{PLOTS[run['benchmark']]}, {gpu}]({link})")
            parts.append(f"<sub>{describe(run['header'])}; `benchmarks/results/{name}.json`</sub>")
    return "\n\n".join(parts) if parts else "No results yet: run `make bench` on a GPU."


def write(runs: dict[str, Row], folder: Path) -> Path:
    readme = ROOT / "README.md"
    text = replace_between(readme.read_text(), sections(runs, folder))
    readme.write_text(replace_between(text, recipes(), RECIPES))
    status.show(readme)
    return readme


_SCALES = {
    "tensorwise": "one per tensor",
    "rowwise": "one per row",
    "blockwise": "one per 128 elements of a row; weight: per 128 x 128",
}
_RESULTS = {"fprop": "y", "dgrad": "dx", "wgrad": "dW"}


def recipes() -> str:
    """The table of recipes, as the library has it."""
    default = import_fp8().recipe.DEFAULT_GROUPED_RECIPE
    lines = []
    for name, recipe in import_fp8().RECIPES.items():
        scales = _SCALES[recipe.granularity]
        if recipe.scaling == "delayed":
            scales += ", from the 16 calls before ([Delayed scaling](#delayed-scaling))"
        of_input, of_grad = (
            str(dtype).removeprefix("torch.float8_").removesuffix("fn")
            for dtype in (recipe.input_dtype, recipe.grad_output_dtype)
        )
        takes = "yes" if "grouped" in recipe.linears else "no"
        fast = ", ".join(_RESULTS[product] for product in recipe.fast_accum)
        wgrad = recipe.wgrad.replace("fp8", "FP8")
        experts = f"{takes}, the default" if name == default else takes
        lines.append([f"`{name}`", scales, of_input, of_grad, wgrad, fast or "none", experts])
    columns = [
        "recipe",
        "scales",
        "x, weight",
        "dy",
        "weight gradient",
        "accumulate fast",
        "experts",
    ]
    return tables.markdown(columns, lines, left=len(columns))


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


# In the README's order.
SECTIONS: dict[str, Callable[[list[Row]], str]] = {
    "model": readme_model.section,
    "block": block,
    "moe": moe,
    "linear": linear,
    "accumulate": accumulate,
    "breakdown": breakdown,
    "quantize": quantize,
    "host": host,
}
