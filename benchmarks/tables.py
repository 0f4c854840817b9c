"""Plain text and Markdown tables of benchmark rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from runs import Row


def text(columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """Aligned columns: the first `left` to the left, the others to the right."""
    cells = [[cell(value) for value in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = zip(row, widths, strict=True)
        aligned = (v.ljust(w) if i < left else v.rjust(w) for i, (v, w) in enumerate(padded))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), line(["-" * w for w in widths]), *map(line, cells[1:])])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """The first `left` columns are of words, the others of numbers."""
    lines = [columns, ["---"] * left + ["---:"] * (len(columns) - left), *rows]
    return "\n".join("| " + " | ".join(cell(v) for v in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """Numbers to three or four significant digits, None as empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def ratio(value: float | None) -> str:
    """A speed relative to a baseline: 1.523 -> '1.52x'."""
    return "" if value is None else f"{value:.2f}x"


def spread(times: dict[str, float]) -> str:
    """A Measurement's first to ninth decile: {'low': 100, 'high': 103} -> '3%'."""
    return f"{100 * (times['high'] / times['low'] - 1):.0f}%"


STEP_COLUMNS = ("fwd us", "x bf16", "fwd+bwd us", "x bf16", "spread")


def step_cells(row: Row) -> list[Any]:
    """Those of STEP_COLUMNS: the forward and the whole step, each beside bf16's."""
    return [
        row["forward_us"]["median"],
        ratio(row["forward_speedup"]),
        row["step_us"]["median"],
        ratio(row["step_speedup"]),
        spread(row["step_us"]),
    ]


def pivot(
    corner: str,
    rows: list[Row],
    line: Callable[[Row], str],
    column: Callable[[Row], str],
    cell: Callable[[Row], str],
) -> str:
    """A line for each value of `line`, a column for each of `column`, in the rows' order; columns
    that are sizes, "67 MB", in theirs."""
    found = {(line(row), column(row)): cell(row) for row in rows}
    lines = dict.fromkeys(name for name, _ in found)
    columns = list(dict.fromkeys(name for _, name in found))
    if all(name.endswith(" MB") for name in columns):
        columns.sort(key=lambda name: float(name.removesuffix(" MB")))
    cells = [[name, *(found.get((name, each), "") for each in columns)] for name in lines]
    return markdown([corner, *columns], cells)


def speed_and_memory(row: Row, us: float) -> str:
    """'1.28x / 0.94x', and for bf16 '36.1 ms / 4.1 GiB'."""
    if row["variant"] == "bf16":
        return f"{cell(us / 1e3)} ms / {row['peak_gib']:.1f} GiB"
    return f"{ratio(row['speedup'])} / {ratio(row['peak_ratio'])}"
