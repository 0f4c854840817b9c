"""From the JSON of benchmark runs: tables on the screen, the README's table, two plots, and a check
against earlier runs.

    python benchmarks/report.py                      # print what is in benchmarks/results
    python benchmarks/report.py --readme --plots     # write README.md's table and the PNG plots
    python benchmarks/report.py --check OTHER        # compare ratios with another folder of results

The README's table stands between the lines `<!-- bench:begin -->` and `<!-- bench:end -->`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bench_block
import bench_host
import bench_linear
import bench_matmul
import bench_quantize
import bench_sizes
import tables
from runs import RESULTS, ROOT, Row, read

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TABLES = {
    "linear": bench_linear.table,
    "quantize": bench_quantize.table,
    "host": bench_host.table,
    "matmul": bench_matmul.table,
    "block": bench_block.table,
    "sizes": bench_sizes.table,
}

# What a later run is compared by: figures that hardly depend on the machine, larger is better.
RATIOS = {
    "linear": (("m", "k", "n", "variant"), "step_speedup"),
    "quantize": (("op", "input_mb"), "of_copy"),
    "host": (("variant",), "step_ratio"),
    "matmul": (("m", "k", "n", "variant"), "speedup"),
    "block": (("variant",), "speedup"),
    "sizes": (("m", "k", "n", "variant"), "step_speedup"),
}
SMALLER_IS_BETTER = {"step_ratio"}


def load(folder: Path) -> dict[str, Row]:
    """Every run in the folder by the name of its file."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def readme_table(runs: dict[str, Row]) -> str:
    """Markdown: decoder layers, then single layers, for each GPU that was measured."""
    parts = []
    for name, run in runs.items():
        facts = run["header"]
        if run["benchmark"] == "block":
            parts.append(block_table(facts, run["rows"]))
        elif run["benchmark"] == "linear":
            parts.append(linear_table(facts, run["rows"]))
        else:
            continue
        parts.append(f"<sub>{describe(facts)}; `benchmarks/results/{name}.json`</sub>")
    return "\n\n".join(parts) if parts else "No results yet: run `make bench` on a GPU."


def describe(facts: Row) -> str:
    return (
        f"{facts['gpu']}, driver {facts['driver']}, CUDA {facts['cuda']}, torch {facts['torch']}, "
        f"cuBLASLt {facts['cublaslt']}, commit {facts['commit'] or 'unknown'}"
    )


def block_table(facts: Row, rows: list[Row]) -> str:
    columns = ["Two Llama-3-8B layers, 8192 tokens", "fwd ms", "fwd+bwd ms", "speed", "memory"]
    lines = [
        [
            row["variant"],
            row["forward_us"]["median"] / 1e3,
            row["step_us"]["median"] / 1e3,
            tables.ratio(row["speedup"]),
            tables.ratio(row["peak_ratio"]),
        ]
        for row in rows
    ]
    return f"**{facts['gpu']}**\n\n" + tables.markdown(columns, lines)


def linear_table(facts: Row, rows: list[Row]) -> str:
    """One line per shape: the step's speed against bf16, without the peers' slower forms (which the
    JSON has)."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    left_out = ("bf16", "GEMMs alone, rowwise")
    variants = [v for v in variants if v not in left_out and not v.endswith(" eager")]
    shapes = list(dict.fromkeys((row["m"], row["k"], row["n"]) for row in rows))
    found = {(row["m"], row["k"], row["n"], row["variant"]): row for row in rows}
    lines = []
    for shape in shapes:
        cells = [found.get((*shape, variant)) for variant in variants]
        m, k, n = shape
        lines.append(
            [
                f"M={m}, {k} → {n}",
                found[(*shape, "bf16")]["step_us"]["median"] / 1e3,
                *(tables.ratio(row["step_speedup"]) if row else "" for row in cells),
            ]
        )
    columns = ["One layer, fwd+bwd", "bf16 ms", *variants]
    return f"**{facts['gpu']}**\n\n" + tables.markdown(columns, lines)


def replace_between(document: str, table: str) -> str:
    """The document with `table` between the markers. Raises ValueError when they are missing."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document lacks the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def ratios(run: Row) -> dict[tuple, float]:
    """Key of each row and its figure of merit, larger is better."""
    keys, figure = RATIOS[run["benchmark"]]
    invert = figure in SMALLER_IS_BETTER
    return {
        tuple(row[key] for key in keys): 1 / row[figure] if invert else row[figure]
        for row in run["rows"]
    }


def regressions(new: Row, old: Row, tolerance: float = 0.07) -> list[str]:
    """Rows of `new` slower than the same rows of `old` by more than the tolerance. Only our own
    variants count."""
    before = ratios(old)
    worse = []
    for key, value in ratios(new).items():
        ours = not any(isinstance(k, str) and k.startswith(("bf16", "torch", "TE")) for k in key)
        if ours and key in before and value < before[key] * (1 - tolerance):
            worse.append(f"{new['benchmark']} {key}: {value:.3f}, was {before[key]:.3f}")
    return worse


def plot(runs: dict[str, Row], folder: Path) -> list[Path]:
    import plots

    written = []
    for name, run in runs.items():
        draw = {"linear": plots.speedup_over_shapes, "block": plots.step_times}.get(
            run["benchmark"]
        )
        if draw:
            path = folder / f"{name}.png"
            draw(run, path)
            written.append(path)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", action="store_true", help="write README.md's table")
    parser.add_argument("--plots", action="store_true", help="draw the PNG plots beside the JSON")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="earlier results; exit code 1")
    options = parser.parse_args()
    runs = load(options.results)
    if not runs:
        print(
            f"no results in {options.results}: run the benchmarks on a GPU first", file=sys.stderr
        )
        return 1
    for run in runs.values():
        benchmark, rows = run["benchmark"], run["rows"]
        print(f"\n{benchmark}: {describe(run['header'])}\n{TABLES[benchmark](rows)}")
    if options.readme:
        readme = ROOT / "README.md"
        readme.write_text(replace_between(readme.read_text(), readme_table(runs)))
        print(f"wrote {readme}")
    if options.plots:
        for path in plot(runs, options.results):
            print(f"wrote {path}")
    if options.check:
        earlier = load(options.check)
        worse = [
            w for name in runs if name in earlier for w in regressions(runs[name], earlier[name])
        ]
        print("\n".join(worse) or "no regression")
        return 1 if worse else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
