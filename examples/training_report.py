"""What `make demo` leaves behind: a table on the terminal, the curves as CSV and as PNG.

The first variant is the baseline; every gap is a variant's loss minus the baseline's loss on the
same batch, in nats per byte.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from comparison import Variant

COLOURS = ("#1f1f1f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe-Ito


def totals(summary: str) -> list[str]:
    """The lines of fp8.summary's text below its rows: linears, experts, what is fused."""
    lines = summary.splitlines()
    return lines[next(i for i, line in enumerate(lines) if " linear: " in line) :]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the `window` (odd) values around each; near the ends over fewer, still centred."""
    last = len(values) - 1
    sides = [min(window // 2, i, last - i) for i in range(len(values))]
    return [statistics.fmean(values[i - side : i + side + 1]) for i, side in enumerate(sides)]


def gaps(variant: Variant, baseline: Variant) -> list[float]:
    """Loss minus the baseline's, step by step."""
    return [a - b for a, b in zip(variant.losses, baseline.losses, strict=True)]


def final_gap(variant: Variant, baseline: Variant) -> float:
    """Mean gap over the last tenth of the steps (at least 5)."""
    return statistics.fmean(gaps(variant, baseline)[-max(5, len(variant.losses) // 10) :])


def table(variants: Sequence[Variant]) -> str:
    """One row per variant: losses, gaps, time, memory; columns aligned for a terminal."""
    baseline = variants[0]
    steps = len(baseline.losses)
    shown = sorted({1, max(1, steps // 4), max(1, steps // 2), max(1, 3 * steps // 4), steps})
    with_memory = any(variant.peak_bytes for variant in variants)
    header = [
        "variant",
        *(f"loss @{step}" for step in shown),
        "gap",
        "held-out",
        "held-out gap",
        "ms/step",
        "speed",
        *(["peak GiB"] if with_memory else []),
    ]
    rows = []
    for variant in variants:
        own = variant is baseline
        milliseconds = variant.median_milliseconds()
        rows.append(
            [
                variant.name,
                *(f"{variant.losses[step - 1]:.4f}" for step in shown),
                "" if own else f"{final_gap(variant, baseline):+.4f}",
                f"{variant.held_out:.4f}",
                "" if own else f"{variant.held_out - baseline.held_out:+.4f}",
                f"{milliseconds:.1f}",
                f"{baseline.median_milliseconds() / milliseconds:.2f}x",
                *([f"{variant.peak_bytes / 2**30:.2f}"] if with_memory else []),
            ]
        )
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cells) for cells in ([_align(row, widths) for row in [header, *rows]])]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def write_csv(path: Path, variants: Sequence[Variant]) -> None:
    """One row per step: step, then loss (nats per byte) and time (ms) of each variant."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [variant.name for variant in variants]
        writer.writerow(
            ["step", *(f"loss {name}" for name in names), *(f"ms {name}" for name in names)]
        )
        for step in range(len(variants[0].losses)):
            losses = [f"{variant.losses[step]:.6f}" for variant in variants]
            times = [f"{variant.milliseconds[step]:.3f}" for variant in variants]
            writer.writerow([step + 1, *losses, *times])


def write_plot(path: Path, variants: Sequence[Variant], title: str) -> None:
    """Loss curves (left) and gap to the baseline (right); raw values faint, means bold."""
    baseline = variants[0]
    steps = range(1, len(baseline.losses) + 1)
    window = 2 * max(1, min(10, len(baseline.losses) // 16)) + 1
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    legend = []
    for index, variant in enumerate(variants):
        colour = COLOURS[index % len(COLOURS)]
        style = {"color": colour, "solid_capstyle": "round"}
        left.plot(steps, variant.losses, alpha=0.18, linewidth=0.8, **style)
        left.plot(
            steps,
            smooth(variant.losses, window),
            linewidth=1.6,
            # Dashes that do not meet: curves on top of each other all stay visible.
            linestyle="-" if variant is baseline else (6 * index, (5, 6 * len(variants) - 11)),
            **style,
        )
        legend.append(Line2D([], [], color=colour, linewidth=2, label=variant.name))
        if variant is not baseline:
            gap = gaps(variant, baseline)
            right.plot(steps, gap, alpha=0.25, linewidth=0.8, **style)
            right.plot(steps, smooth(gap, window), linewidth=1.6, **style)
    right.axhline(0, color=COLOURS[0], linewidth=1)
    left.set(title="Training loss", xlabel="step", ylabel="loss (nats per byte)")
    right.set(
        title=f"Gap to {baseline.name}",
        xlabel="step",
        ylabel="difference in loss (nats per byte)",
    )
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(1, max(2, len(baseline.losses)))
    figure.suptitle(title, fontsize=10)
    note = f"bold: mean of {window} steps, faint: single steps"
    figure.legend(
        handles=legend,
        loc="outside lower center",
        ncols=min(4, len(variants)),
        frameon=False,
        title=note,
        title_fontsize=8,
    )
    figure.savefig(path, dpi=130)


def _align(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(cells, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
