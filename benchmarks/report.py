"""From the JSON of benchmark runs: tables on the screen, those of README.md and docs/, plots, and a
check against earlier runs.

    python benchmarks/report.py                      # print what is in benchmarks/results
    python benchmarks/report.py --readme --plots     # write README.md, docs/ and the PNG plots
    python benchmarks/report.py --check OTHER        # compare ratios with another folder of results

documents.py has the list of what is generated where: these tables, that of the checks (status.py)
and that of the recipes, which the library has.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bench_accumulate
import bench_block
import bench_breakdown
import bench_decode
import bench_experts
import bench_fsdp
import bench_generate
import bench_grouped
import bench_host
import bench_linear
import bench_matmul
import bench_model
import bench_moe
import bench_quantize
import bench_sizes
import documents
import regressions
import sections
import tables
from runs import RESULTS, Row, read

TABLES = {
    "model": bench_model.table,
    "linear": bench_linear.table,
    "block": bench_block.table,
    "accumulate": bench_accumulate.table,
    "breakdown": bench_breakdown.table,
    "quantize": bench_quantize.table,
    "matmul": bench_matmul.table,
    "decode": bench_decode.table,
    "experts": bench_experts.table,
    "generate": bench_generate.table,
    "host": bench_host.table,
    "sizes": bench_sizes.table,
    "moe": bench_moe.table,
    "grouped": bench_grouped.table,
    "fsdp": bench_fsdp.table,
}


def load(folder: Path) -> dict[str, Row]:
    """Every run in the folder by the name of its file, but for runs whose rows lack fields: those
    are of an earlier form, and named on stderr."""
    runs = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("status_"):  # of a check: status.py
            continue
        run = read(path)
        lacking = regressions.lacking(run)
        if run["benchmark"] not in TABLES or lacking:
            why = f"lacks {', '.join(sorted(lacking))}" if lacking else "unknown benchmark"
            print(f"ignored {path}: {why}; measure it again", file=sys.stderr)
            continue
        runs[path.stem] = run
    return runs


def wall_times(runs: dict[str, Row]) -> str:
    lines = [[name, run["header"].get("wall_s")] for name, run in runs.items()]
    lines.append(["all", float(sum(seconds or 0 for _, seconds in lines))])
    return tables.text(["run", "wall s"], lines)


def plot(runs: dict[str, Row], folder: Path) -> list[Path]:
    import plots

    draw = {
        "model": plots.model_cases,
        "linear": plots.speed_over_tokens,
        "block": plots.decoder_cases,
        "breakdown": plots.breakdown,
    }
    written = []
    for name, run in runs.items():
        if run["benchmark"] in draw:
            path = folder / f"{name}.png"
            draw[run["benchmark"]](run, path)
            written.append(path)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", action="store_true", help="write README.md's and docs/' tables")
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
        print(f"\n{benchmark}: {sections.describe(run['header'])}\n{TABLES[benchmark](rows)}")
    print(f"\n{wall_times(runs)}\n")
    if options.plots:  # before the pages, which link to those that exist
        for path in plot(runs, options.results):
            print(f"wrote {path}")
    if options.readme:
        for path in documents.write(runs, options.results):
            print(f"wrote {path}")
    if options.check:
        well, text = regressions.check(runs, load(options.check))
        print(text)
        return 0 if well else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
