"""Elementwise operators by profile against a device copy of as many bytes: what norms.py and
ropes.py share."""

from __future__ import annotations

import passes
import timing
from runs import Row


def result(op: str, rows: int, columns: int, per_element: int, us: float, repeats: int) -> Row:
    """A row of the JSON: [rows, columns] of 16 bits, of which each element moves so many bytes,
    took `us`."""
    moved = rows * columns * per_element
    copied = passes.copy_us(moved, repeats)
    return {
        "op": op,
        "m": rows,
        "k": columns,
        "input_mb": rows * columns * 2 / 1e6,
        "bytes_per_element": per_element,
        "time_us": timing.summarize([us]).as_dict(),
        "copy_us": timing.summarize([copied]).as_dict(),
        "gb_per_s": moved / us / 1e3,
        "of_copy": copied / us,
    }


def show(rows: list[Row], width: int) -> None:
    """Prints a line for each row, the operator's name in so many characters."""
    for row in rows:
        print(
            f"{row['op']:{width}} {row['m']:7} {row['input_mb']:6.0f} MB "
            f"{row['time_us']['median']:8.1f} us {row['gb_per_s']:6.0f} GB/s "
            f"{100 * row['of_copy']:5.1f}% of copy"
        )
