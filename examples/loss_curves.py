"""Is FP8's loss within the run-to-run noise of bf16? The demo's model, longer, over several seeds.

nn.Linear is trained from several seeds (initial weights and batches), each recipe from the first of
them; all are judged on the same held-out text. The range of nn.Linear's results is the noise.
Run it with `make loss-curves`, or `PYTHONPATH=python python examples/loss_curves.py --help`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import fp8
from comparison import Batch, Schedule, Variant, evaluate, train
from stdlib_text import Text, load_text
from train import JOBS, Job, describe, make_variants
from training_report import COLOURS, smooth, write_csv

HELD_OUT_BATCHES = 32


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=JOBS, help="model and batch (default: cpu or gpu)")
    parser.add_argument("--steps", type=int, default=300, help="of each run (default: 300)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of nn.Linear (default: 3)")
    parser.add_argument("--recipes", nargs="*", default=list(fp8.RECIPES), metavar="RECIPE")
    parser.add_argument("--out", type=Path, default=Path("build/loss"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2 for a noise, got {options.seeds}")
    options.size = options.size or ("cpu" if options.device == "cpu" else "gpu")
    return options


def run_seed(
    job: Job, text: Text, seed: int, recipes: Sequence[str], steps: int, device: torch.device
) -> list[Variant]:
    """nn.Linear and the recipes from one seed, trained and judged; their models are given back."""
    schedule = Schedule(steps, job.learning_rate, warmup=max(1, steps // 8))
    variants = make_variants(job, recipes, schedule, seed, device)
    if seed == 0:
        print(describe(job, text, variants[0].model, device, steps))
    held_out = [text.held_out_batch(i, job.batch, job.length) for i in range(HELD_OUT_BATCHES)]
    quiet = not sys.stderr.isatty()
    with tqdm(total=steps * len(variants), unit="step", mininterval=10 if quiet else 0.2) as bar:
        bar.set_description(f"seed {seed}")

        def batch_of(step: int) -> Batch:
            return text.batch(step, job.batch, job.length, seed)

        train(variants, batch_of, schedule, device, lambda variant: bar.update() and None)
    for variant in variants:
        variant.held_out = evaluate(variant.model, held_out, device)
        del variant.model, variant.optimizer
    variants[0].name += f", seed {seed}"
    return variants


def table(seeds: Sequence[Variant], recipes: Sequence[Variant]) -> str:
    """One line a run: held-out loss, and its distance from nn.Linear with the same seed."""
    noise = noise_of(seeds)
    width = max(len(variant.name) for variant in [*seeds, *recipes])
    lines = [f"{'run':{width}}  held-out  to seed 0  of the noise  ms/step"]
    for variant in [*seeds, *recipes]:
        gap = variant.held_out - seeds[0].held_out
        lines.append(
            f"{variant.name:{width}}  {variant.held_out:8.4f}  {gap:+9.4f}  "
            f"{abs(gap) / noise:11.0%}  {variant.median_milliseconds():7.1f}"
        )
    lines.append(f"noise: largest difference between two seeds of nn.Linear, {noise:.4f} nats/byte")
    return "\n".join(lines)


def noise_of(seeds: Sequence[Variant]) -> float:
    """Largest difference in held-out loss between two runs of nn.Linear."""
    losses = [variant.held_out for variant in seeds]
    return max(losses) - min(losses)


def write_plot(
    path: Path, seeds: Sequence[Variant], recipes: Sequence[Variant], title: str
) -> None:
    """Smoothed training losses, nn.Linear's seeds in grey (left); held-out losses (right)."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    steps = range(1, len(seeds[0].losses) + 1)
    window = 2 * max(1, len(steps) // 32) + 1
    for index, variant in enumerate(seeds):
        label = None if index else f"nn.Linear, {len(seeds)} seeds"
        left.plot(steps, smooth(variant.losses, window), color="#9a9a9a", lw=3, label=label)
    for index, variant in enumerate(recipes):
        colour = COLOURS[1 + index % (len(COLOURS) - 1)]
        left.plot(steps, smooth(variant.losses, window), color=colour, lw=1.2, label=variant.name)
    everyone = [*seeds, *recipes]
    right.axvspan(
        min(v.held_out for v in seeds), max(v.held_out for v in seeds), color="#d8d8d8", lw=0
    )
    for index, variant in enumerate(everyone):
        recipe = index - len(seeds)
        colour = "#5f5f5f" if recipe < 0 else COLOURS[1 + recipe % (len(COLOURS) - 1)]
        right.plot(variant.held_out, index, "o", color=colour)
    right.set_yticks(range(len(everyone)), [variant.name for variant in everyone])
    right.invert_yaxis()
    left.set(title=f"Training loss (mean of {window} steps)", xlabel="step", ylabel="nats per byte")
    right.set(title="Held-out loss; grey: noise of nn.Linear", xlabel="nats per byte")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; status 1 where a recipe is outside of the noise."""
    options = parse(arguments)
    job, device, text = JOBS[options.size], torch.device(options.device), load_text()
    first, *recipes = run_seed(job, text, 0, options.recipes, options.steps, device)
    seeds = [first]
    for seed in range(1, options.seeds):
        seeds += run_seed(job, text, seed, [], options.steps, device)

    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "curves.csv", [*seeds, *recipes])
    title = f"{options.steps} steps of {job.batch} x {job.length} bytes, {device.type}, eager"
    write_plot(options.out / "curves.png", seeds, recipes, title)
    print(f"\n{table(seeds, recipes)}\ncurves and data in {options.out}")
    noise = noise_of(seeds)
    outside = [v.name for v in recipes if abs(v.held_out - first.held_out) > noise]
    if outside:
        print(f"Result: outside of the noise: {', '.join(outside)}.")
        return 1
    print("Result: every recipe is within the noise of nn.Linear.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
