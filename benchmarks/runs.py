"""Benchmark runs as JSON in benchmarks/results, with a header: what was measured on what."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NO_GPU = 2  # exit code

Row = dict[str, Any]


def import_fp8() -> Any:
    """The installed package, or the one built in this tree."""
    if find_spec("fp8") is None:
        sys.path.insert(0, str(ROOT / "python"))
    import fp8

    return fp8


def git_commit() -> str:
    """Short hash, with + when the tree has changes, but for what runs write there: results and the
    tables of README.md and docs/. FP8_COMMIT says it where the tree is a copy."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if named := os.environ.get("FP8_COMMIT"):
        return named
    try:
        ours = ("--", ".", ":!benchmarks/results", ":!README.md", ":!docs")
        changed = git("status", "--porcelain", "--untracked-files=no", *ours)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def header() -> Row:
    """GPU, driver, CUDA, torch, cuBLASLt, commit and command."""
    facts: Row = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "driver": driver_version(),
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "cublaslt": 0,
        "fp8": "",
        "commit": git_commit(),
        "command": " ".join(["python", *sys.argv]),
    }
    try:
        fp8 = import_fp8()
        from fp8._native import loader as _loader

        facts["fp8"] = fp8.__version__
        facts["cublaslt"] = _loader.native().cublaslt_runtime_version()
    except ImportError as error:
        facts["fp8"] = f"not importable: {str(error).splitlines()[0]}"
    return facts


def slug(gpu: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'h100'; 'NVIDIA H200' -> 'h200'."""
    words = [word for word in gpu.lower().split() if word not in ("nvidia", "geforce")]
    return "".join(c for c in (words[0] if words else "none") if c.isalnum())


def path_of(benchmark: str, gpu: str, folder: Path = RESULTS) -> Path:
    return folder / f"{benchmark}_{slug(gpu)}.json"


def write(
    benchmark: str, rows: list[Row], facts: Row, skipped: Row, folder: Path = RESULTS
) -> Path:
    """skipped: peers that were left out, with the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(benchmark, facts["gpu"], folder)
    run = {"benchmark": benchmark, "header": facts, "skipped": skipped, "rows": rows}
    path.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n")
    return path


def read(path: Path) -> Row:
    """Raises ValueError when the file is no benchmark run."""
    run = json.loads(path.read_text())
    missing = {"benchmark", "header", "rows"} - set(run)
    if missing:
        raise ValueError(f"{path}: not a benchmark run, lacks {', '.join(sorted(missing))}")
    return run


def main(
    benchmark: str,
    description: str,
    measure: Callable[[argparse.Namespace], tuple[list[Row], Row]],
    table: Callable[[list[Row]], str],
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """The command line that all benchmarks share. Returns the exit code: 2 without a GPU, 1 when
    there is no row. wall_s and autotuned (of any row) join the header.

    measure may call options.save(rows, skipped) with what it has so far: should the run end before
    its time, that much is in the JSON, with "unfinished" in the header."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--no-write", action="store_true", help="print only")
    if arguments:
        arguments(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{benchmark}: needs a CUDA GPU, and this machine has none.", file=sys.stderr)
        return NO_GPU
    begin = time.perf_counter()
    facts = header()
    print("\n".join(f"{name:9} {value}" for name, value in facts.items()), flush=True)

    def finish(rows: list[Row]) -> None:
        facts["wall_s"] = round(time.perf_counter() - begin, 1)
        facts["autotuned"] = any(row.get("autotuned", False) for row in rows)

    def save(rows: list[Row], skipped: Row) -> None:
        finish(rows)
        if rows and not options.no_write:
            write(benchmark, rows, facts | {"unfinished": True}, skipped, options.output)

    options.save = save
    rows, skipped = measure(options)
    finish(rows)
    for name, why in skipped.items():
        print(f"skipped   {name}: {why}")
    if not rows:
        print(f"{benchmark}: nothing was measured", file=sys.stderr)
        return 1
    print(f"\n{table(rows)}\n\n{benchmark} took {facts['wall_s']:.0f} s")
    if not options.no_write:
        print(f"\nwrote {write(benchmark, rows, facts, skipped, options.output)}")
    return 0
