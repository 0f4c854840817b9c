"""bench_model's rows that need Liger, from a process of their own: it patches transformers."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from runs import Row, read

PROGRAM = Path(__file__).with_name("bench_model.py")
LATE = "the time limit was reached"
GRACE = 60.0  # seconds beyond the limit: what has begun may end


def command(group: str, options: argparse.Namespace, seconds: float, folder: str) -> list[str]:
    """bench_model's, with what this process was asked for."""
    found = [sys.executable, str(PROGRAM), "--liger", "--models", group]
    found += ["--output", folder, "--time-limit", str(round(seconds, 1))]
    for option in ("variants", "profile"):
        if (chosen := getattr(options, option)) is not None:
            found += [f"--{option}", *chosen]
    if options.repeats:
        found += ["--repeats", str(options.repeats)]
    return [*found, "--quick"] if options.quick else found


def rows_of(group: str, options: argparse.Namespace, seconds: float) -> tuple[list[Row], Row]:
    """The rows of a group of cases, bf16's among them, and what was left out. seconds: of the time
    limit that are left. What the process had written before it failed counts."""
    rows: list[Row] = []
    skipped: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        call = command(group, options, seconds, folder)
        try:  # its errors and its progress are seen, its table is not
            ended = subprocess.run(call, stdout=subprocess.DEVNULL, timeout=seconds + GRACE)
            if ended.returncode:
                skipped[f"Liger with {group}"] = f"its process ended with status {ended.returncode}"
        except subprocess.TimeoutExpired:
            skipped[f"Liger with {group}"] = LATE
        for run in map(read, Path(folder).glob("*.json")):
            skipped |= run.get("skipped", {})
            rows += run["rows"]
    return rows, skipped
