"""PNG plots of benchmark runs, drawn from their JSON only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import sections_model
from bench_block import case_of
from matplotlib import colors, pyplot
from model_cases import case_name
from runs import Row

# One hue per family in every plot: the reference grey, ours blue, the ceiling black, peers warm.
_COLOURS = {
    "bf16": "#8c8c8c",
    "fp8": "#1f5fbf",
    "GEMMs": "#000000",
    "torchao": "#d1752b",
    "TE": "#9a4a8c",
}
_GROUPS = ("#1f5fbf", "#2a9d8f", "#9a4a8c", "#b8b8b8", "#eadfca")  # classes of kernels, rest
_WHITENED = (0.0, 0.35, 0.6, 0.75)


def colour(variant: str, position: int = 0) -> tuple[float, ...]:
    """position: of the variant within its family; the first has the full colour."""
    full = colors.to_rgb(_COLOURS.get(variant.split()[0], "#444444"))
    white = _WHITENED[min(position, len(_WHITENED) - 1)]
    return tuple(channel + (1 - channel) * white for channel in full)


def _hatch(variant: str) -> str:
    """Tells ours and bf16 apart from themselves with another's elementwise kernels."""
    if "Liger" in variant:
        return "..."
    compiled = variant.startswith(("bf16", "fp8")) and variant.endswith("compiled")
    return "///" if compiled else ""


def _positions(variants: list[str]) -> dict[str, int]:
    """Those that only differ in the hatch share a position."""
    seen: dict[str, list[str]] = {}
    found = {}
    for variant in variants:
        base = variant.split(" + ")[0]
        base = base.removesuffix(" compiled") if _hatch(variant) else base
        family = seen.setdefault(variant.split()[0], [])
        if base not in family:
            family.append(base)
        found[variant] = family.index(base)
    return found


def speed_over_tokens(run: Row, path: Path) -> None:
    """Speed of a layer's step (forward + backward) against bf16, a line over M for each variant; a
    panel for each layer of the sweep."""
    rows = [row for row in run["rows"] if row["sweep"] == "tokens"]
    layers = list(dict.fromkeys((row["k"], row["n"]) for row in rows))
    variants = [v for v in dict.fromkeys(row["variant"] for row in rows) if v != "bf16"]
    places = _positions(variants)
    figure, panels = pyplot.subplots(
        1, len(layers), figsize=(10, 3.8), sharey=True, squeeze=False, constrained_layout=True
    )
    for axes, (k, n) in zip(panels[0], layers, strict=True):
        for variant in variants:
            chosen = [r for r in rows if (r["k"], r["n"], r["variant"]) == (k, n, variant)]
            axes.plot(
                [row["m"] for row in chosen],
                [row["step_speedup"] for row in chosen],
                marker="o",
                markersize=4,
                linestyle="--" if variant.startswith("GEMMs") else "-",
                label=variant,
                color=colour(variant, places[variant]),
            )
        tokens = sorted({row["m"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(m) for m in tokens], fontsize=8)
        axes.axhline(1, color=_COLOURS["bf16"], linewidth=1)
        axes.set_xlabel("tokens, M")
        axes.set_title(f"{k} → {n}", loc="left", fontsize=10)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("speed against bf16 nn.Linear")
    panels[0][0].set_ylim(bottom=0)
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"One linear layer, forward + backward, {run['header']['gpu']}", fontsize=11)
    _save(figure, path)


def decoder_cases(run: Row, path: Path) -> None:
    """Decoder layers against bf16, a group of bars for each case: speed, and peak memory."""
    title = f"Llama 3 decoder layers, forward + backward, {run['header']['gpu']}"
    _speed_and_memory(run["rows"], case_of, title, path)


def model_cases(run: Row, path: Path) -> None:
    """Training steps in the same way."""
    title = f"Training steps of transformers' models, {run['header']['gpu']}"

    def name(row: Row) -> str:
        return case_name(row).replace(", ", "\n")

    _speed_and_memory(sections_model.shown(run["rows"]), name, title, path)


def _speed_and_memory(
    rows: list[Row], case_of: Callable[[Row], str], title: str, path: Path
) -> None:
    cases = list(dict.fromkeys(case_of(row) for row in rows))
    variants = [v for v in dict.fromkeys(row["variant"] for row in rows) if v != "bf16"]
    if not variants:
        return
    places = _positions(variants)
    found = {(case_of(row), row["variant"]): row for row in rows}
    offsets = {}  # in bars, from the middle of the case's group
    for case in cases:
        present = [variant for variant in variants if (case, variant) in found]
        for i, variant in enumerate(present):
            offsets[case, variant] = i - (len(present) - 1) / 2
    figure, panels = pyplot.subplots(2, 1, figsize=(10, 6), sharex=True, constrained_layout=True)
    width = 0.84 / len(variants)
    for axes, field, label in zip(
        panels, ("speedup", "peak_ratio"), ("speed, bf16 = 1", "peak memory, bf16 = 1"), strict=True
    ):
        for variant in variants:
            have = [j for j, case in enumerate(cases) if (case, variant) in found]
            axes.bar(
                [j + width * offsets[cases[j], variant] for j in have],
                [found[cases[j], variant][field] for j in have],
                width * 0.92,
                label=variant,
                color=colour(variant, places[variant]),
                hatch=_hatch(variant),
                edgecolor="white",
                linewidth=0,
            )
        axes.axhline(1, color=_COLOURS["bf16"], linewidth=1)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_xticks(range(len(cases)), cases, fontsize=8)
    panels[0].set_title(title, loc="left")
    below = -0.12 - 0.06 * max(case.count("\n") for case in cases)  # the lines of a case's name
    panels[1].legend(
        frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, below)
    )
    _save(figure, path)


def breakdown(run: Row, path: Path) -> None:
    """A step's time as one bar of kernel classes and the rest for each variant, a panel a case."""
    rows = run["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    groups = dict(zip(("gemm", "quantize", "attention", "other", "rest"), _GROUPS, strict=True))
    figure, panels = pyplot.subplots(
        len(cases), 1, figsize=(10, 0.5 + 1.25 * len(cases)), squeeze=False, constrained_layout=True
    )
    for axes, case in zip(panels[:, 0], cases, strict=True):
        chosen = [row for row in rows if row["case"] == case]
        left = [0.0] * len(chosen)
        for group, tint in groups.items():
            widths = [row[f"{group}_us"] / 1e3 for row in chosen]
            axes.barh(
                range(len(chosen)),
                widths,
                left=left,
                color=tint,
                label=group.replace("gemm", "GEMM"),
                height=0.7,
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for i, row in enumerate(chosen):
            note = f" {row['speedup']:.2f}x, {row['kernels']} kernels"
            axes.text(left[i], i, note, va="center", fontsize=8)
        axes.set_yticks(range(len(chosen)), [row["variant"] for row in chosen], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(right=1.2 * max(left))
        axes.set_title(case, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("ms a step, forward + backward")
    panels[-1, 0].legend(
        frameon=False, fontsize=8, ncols=5, loc="upper left", bbox_to_anchor=(0, -0.45)
    )
    figure.suptitle(f"Where a step's time goes, {run['header']['gpu']}", fontsize=11)
    _save(figure, path)


def _save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
