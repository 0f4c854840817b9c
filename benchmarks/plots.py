"""PNG plots of benchmark runs, drawn from their JSON only."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import colors, pyplot
from runs import Row

# One hue per family in every plot: the reference grey, ours blue, the ceiling black, peers warm.
_COLOURS = {
    "bf16": "#8c8c8c",
    "fp8": "#1f5fbf",
    "GEMMs": "#000000",
    "torchao": "#d1752b",
    "TE": "#9a4a8c",
}
_WHITENED = (0.0, 0.35, 0.6, 0.75)


def colour(variant: str, position: int = 0) -> tuple[float, ...]:
    """position: of the variant within its family; the first has the full colour."""
    full = colors.to_rgb(_COLOURS.get(variant.split()[0], "#444444"))
    white = _WHITENED[min(position, len(_WHITENED) - 1)]
    return tuple(channel + (1 - channel) * white for channel in full)


def _positions(variants: list[str]) -> dict[str, int]:
    seen: dict[str, int] = {}
    found = {}
    for variant in variants:
        family = variant.split()[0]
        found[variant] = seen.get(family, 0)
        seen[family] = found[variant] + 1
    return found


def speedup_over_shapes(run: Row, path: Path) -> None:
    """Speed of a step (forward + backward) against bf16: a group of bars for each shape."""
    rows = run["rows"]
    shapes = list(dict.fromkeys((row["m"], row["k"], row["n"]) for row in rows))
    variants = [v for v in dict.fromkeys(row["variant"] for row in rows) if v != "bf16"]
    places = _positions(variants)
    value = {(row["m"], row["k"], row["n"], row["variant"]): row["step_speedup"] for row in rows}
    figure, axes = pyplot.subplots(figsize=(10, 4.2), constrained_layout=True)
    width = 0.84 / len(variants)
    for i, variant in enumerate(variants):
        offset = (i - (len(variants) - 1) / 2) * width
        heights = [value.get((*shape, variant), 0) for shape in shapes]
        at = [x + offset for x in range(len(shapes))]
        axes.bar(at, heights, width * 0.92, label=variant, color=colour(variant, places[variant]))
    axes.axhline(1, color=_COLOURS["bf16"], linewidth=1)
    axes.set_xticks(range(len(shapes)), [f"M={m}\n{k} → {n}" for m, k, n in shapes], fontsize=8)
    axes.set_ylabel("speed against bf16 nn.Linear")
    axes.set_title(f"One linear layer, forward + backward, {run['header']['gpu']}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.14))
    _save(figure, path)


def step_times(run: Row, path: Path) -> None:
    """Decoder layers: forward and backward time of each variant as one bar; its peak memory."""
    rows = run["rows"]
    names = [row["variant"] for row in rows]
    places = _positions(names)
    figure, (left, right) = pyplot.subplots(
        1,
        2,
        figsize=(10, 0.6 + 0.42 * len(rows)),
        sharey=True,
        constrained_layout=True,
        width_ratios=(2, 1),
    )
    at = range(len(rows))
    colours = [colour(name, places[name]) for name in names]
    forward = [row["forward_us"]["median"] / 1e3 for row in rows]
    backward = [row["step_us"]["median"] / 1e3 - f for row, f in zip(rows, forward, strict=True)]
    left.barh(at, forward, color=colours)
    left.barh(at, backward, left=forward, color=colours, alpha=0.55)
    for i, row in enumerate(rows):
        total = row["step_us"]["median"] / 1e3
        left.text(total, i, f" {total:.1f} ms, {row['speedup']:.2f}x", va="center", fontsize=8)
    left.set_yticks(at, names, fontsize=8)
    left.invert_yaxis()
    left.set_xlim(right=1.25 * max(f + b for f, b in zip(forward, backward, strict=True)))
    left.set_xlabel("ms: forward (dark), backward (light)")
    left.set_title(
        f"Two Llama-3-8B decoder layers, 8192 tokens, {run['header']['gpu']}", loc="left"
    )
    right.barh(at, [row["peak_gib"] for row in rows], color=colours)
    right.set_xlabel("peak memory, GiB")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
