"""The plot of `fp8.numerics`. Imported where it is asked for, since it needs matplotlib."""

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from ._numerics_sums import NumericsRow

_COLORS = {"x": "tab:blue", "weight": "tab:green", "dy": "tab:orange"}
_LABELS = 40
"""Names on the axis: more are not readable."""
_WORST = 5
"""Layers that are named beside the plot too."""


def plot(
    layers: Mapping[str, Mapping[str, Sequence[NumericsRow]]], path: str | PathLike[str]
) -> None:
    """See `Numerics.plot`."""
    # The figure alone, without pyplot: no window, no state of the process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(layers)
    width = min(max(8.0, 0.05 * len(names)), 20.0)
    figure = Figure(figsize=(width, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    sqnr, shares = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for operand, color in _COLORS.items():
        _draw_sqnr(sqnr, layers, operand, color)
        _draw_shares(shares, layers, operand, color)
    _name_worst(sqnr, layers)
    sqnr.set_ylabel("SQNR, dB")
    shares.set_ylabel("share of elements")
    shares.set_yscale("log")
    shares.set_ylim(1e-6, 1.5)
    for axis in (sqnr, shares):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axis.grid(alpha=0.3)
        axis.margins(x=0.01)
    step = max(1, math.ceil(len(names) / _LABELS))
    places = range(0, len(names), step)
    shares.set_xticks(places, [names[i] for i in places], rotation=90, fontsize=7)
    shares.set_xlabel("layer, in the order of the calls")
    figure.savefig(path, format="png", dpi=120)


def _of(
    layers: Mapping[str, Mapping[str, Sequence[NumericsRow]]], operand: str
) -> list[tuple[int, Any]]:
    """Where the operand was seen: the layer's place, and its worst row."""
    from ._numerics_report import worst_row

    return [
        (place, worst_row(operands[operand]))
        for place, operands in enumerate(layers.values())
        if operand in operands
    ]


def _draw_sqnr(axis: Any, layers: Any, operand: str, color: str) -> None:
    rows = [(i, row.sqnr_db) for i, row in _of(layers, operand) if math.isfinite(row.sqnr_db.mean)]
    if not rows:
        return
    at = [i for i, _ in rows]
    label = "W" if operand == "weight" else operand
    axis.plot(at, [s.mean for _, s in rows], ".-", color=color, lw=0.8, ms=4, label=label)
    low, high = [s.min for _, s in rows], [s.max for _, s in rows]
    axis.vlines(at, low, high, color=color, alpha=0.4, lw=2)


def _name_worst(axis: Any, layers: Any) -> None:
    points = [
        (row.sqnr_db.mean, place, row.layer)
        for operand in _COLORS
        for place, row in _of(layers, operand)
        if math.isfinite(row.sqnr_db.mean)
    ]
    worst: dict[str, tuple[float, int]] = {}
    for sqnr, place, layer in sorted(points):
        if len(worst) < _WORST:
            worst.setdefault(layer, (sqnr, place))
    lines = []
    for number, (layer, (sqnr, place)) in enumerate(worst.items(), 1):
        axis.annotate(str(number), (place, sqnr), (0, -11), textcoords="offset points", ha="center")
        lines.append(f"{number}  {sqnr:.1f} dB  {layer}")
    text = "\n".join(["the worst:", *lines]) if lines else ""
    axis.text(1.01, 0.0, text, transform=axis.transAxes, fontsize=7, va="bottom")


def _draw_shares(axis: Any, layers: Any, operand: str, color: str) -> None:
    label = "W" if operand == "weight" else operand
    for figure, mark in (("flushed", "."), ("saturated", "x")):
        rows = [(i, getattr(row, figure).mean) for i, row in _of(layers, operand)]
        shown = [(i, share) for i, share in rows if share > 0]
        if shown:
            places, values = zip(*shown, strict=True)
            axis.plot(places, values, mark, color=color, ms=5, label=f"{label} {figure}")
