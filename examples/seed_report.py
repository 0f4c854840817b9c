"""What runs of several seeds leave behind: means and spreads on the terminal, curves as CSV, PNG.

The noise is that of the baseline: the largest difference between two of its seeds, which differ in
initial weights and batches. A recipe is judged by its mean gap to the baseline of the same seed.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from comparison import Variant
from training_report import COLOURS, final_gap, smooth, write_csv

Runs = Mapping[str, Sequence[Variant]]
"""Of each variant its runs, in the order of the seeds; the baseline first."""


def by_name(seeds: Sequence[Sequence[Variant]]) -> dict[str, list[Variant]]:
    """From the variants of each seed, in one order."""
    return {runs[0].name: list(runs) for runs in zip(*seeds, strict=True)}


def noise_of(runs: Runs) -> float:
    """Largest difference in held-out loss between two seeds of the baseline."""
    losses = [variant.held_out for variant in next(iter(runs.values()))]
    return max(losses) - min(losses)


def mean_gap(runs: Runs, name: str) -> float:
    """Held-out loss minus the baseline's of the same seed, averaged."""
    baseline = next(iter(runs.values()))
    pairs = zip(runs[name], baseline, strict=True)
    return statistics.fmean(variant.held_out - other.held_out for variant, other in pairs)


def table(runs: Runs) -> str:
    """One line a variant: held-out loss and its spread over the seeds, gaps to the baseline of the
    same seed, on held-out text and over the last tenth of the steps; time of a step."""
    baseline = next(iter(runs.values()))
    width = max(len("variant"), *map(len, runs))
    lines = [
        f"{'variant':{width}}  held-out  spread      gap  of the noise  gap at the end  ms/step"
    ]
    noise = noise_of(runs)
    for name, variants in runs.items():
        losses = [variant.held_out for variant in variants]
        ends = [final_gap(v, other) for v, other in zip(variants, baseline, strict=True)]
        gap = mean_gap(runs, name)
        milliseconds = statistics.median(v.median_milliseconds() for v in variants)
        lines.append(
            f"{name:{width}}  {statistics.fmean(losses):8.4f}  {max(losses) - min(losses):6.4f}  "
            f"{gap:+7.4f}  {abs(gap) / noise:12.0%}  {statistics.fmean(ends):+14.4f}  "
            f"{milliseconds:7.1f}"
        )
    lines.append(f"noise: largest difference between two seeds, {noise:.4f} nats per byte")
    return "\n".join(lines)


def outside(runs: Runs) -> list[str]:
    """Variants whose mean gap is larger than the noise."""
    return [name for name in list(runs)[1:] if abs(mean_gap(runs, name)) > noise_of(runs)]


def verdict(runs: Runs) -> str:
    """One line: is every recipe within the noise?"""
    if far := outside(runs):
        return f"Result: outside of the noise: {', '.join(far)}."
    return "Result: every recipe is within the noise."


def write(folder: Path, name: str, runs: Runs, title: str) -> None:
    """`name`.csv and `name`.png in the folder."""
    named = []
    for variants in runs.values():
        for seed, variant in enumerate(variants):
            named.append(copy.copy(variant))  # whose model may be gone
            named[-1].name = f"{variant.name}, seed {seed}"
    write_csv(folder / f"{name}.csv", named)
    _write_plot(folder / f"{name}.png", runs, title)


def _write_plot(path: Path, runs: Runs, title: str) -> None:
    """Means over the seeds, smoothed; bands reach from the lowest to the highest."""
    steps = len(next(iter(runs.values()))[0].losses)
    window = 2 * max(1, steps // 32) + 1
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, variants) in enumerate(runs.items()):
        colour = COLOURS[index % len(COLOURS)]
        curves = list(zip(*(smooth(variant.losses, window) for variant in variants), strict=True))
        every = range(1, steps + 1)
        means = [statistics.fmean(losses) for losses in curves]
        axes.plot(every, means, color=colour, linewidth=1.4, label=name)
        axes.fill_between(
            every, [min(c) for c in curves], [max(c) for c in curves], color=colour, alpha=0.12
        )
    axes.set(title=title, xlabel="step", ylabel=f"nats per byte (mean of {window} steps)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
