"""The main job: train one transformer with nn.Linear and with each FP8 recipe, and compare.

Same initial weights, same batches, plain eager PyTorch; only the linears inside the blocks differ.
Run it with `make demo`, or `PYTHONPATH=python python examples/train.py --help`.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import devices
import fp8
from byte_model import ByteModel, ModelSize, parameter_count
from comparison import Batch, Schedule, Variant, evaluate, make_variant, train
from fp8.recipe import check_recipe
from stdlib_text import Text, load_text
from training_report import table, totals, write_csv, write_plot

CLOSE = 0.05  # nats per byte of held-out loss: what the last line calls close to the baseline
HELD_OUT_BATCHES = 8


@dataclass(frozen=True)
class Job:
    """A model with the amount of training that suits a kind of device."""

    model: ModelSize
    batch: int  # sequences a step
    length: int  # bytes a sequence
    steps: int
    learning_rate: float
    dtype: torch.dtype
    small: bool  # linears below the size rule of fp8.convert: convert them all the same


JOBS = {
    "tiny": Job(ModelSize(32, 64, 1, 2), 4, 32, 12, 3e-3, torch.float32, small=True),
    "cpu": Job(ModelSize(192, 512, 3, 6), 8, 128, 60, 2e-3, torch.float32, small=True),
    "gpu": Job(ModelSize(4096, 14336, 3, 32), 8, 1024, 120, 2e-4, torch.bfloat16, small=False),
}


RECIPES = {
    # Nothing accumulates fast there.
    "cpu": tuple(n for n, recipe in fp8.RECIPES.items() if "dgrad" not in recipe.fast_accum),
    "cuda": tuple(fp8.RECIPES),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--size", choices=JOBS, help="model and batch (default: cpu or gpu)")
    parser.add_argument("--steps", type=int, help="training steps of each variant")
    parser.add_argument(
        "--recipes",
        nargs="*",
        metavar="RECIPE",
        help="FP8 recipes to compare, with options after a colon, as in rowwise:power_of_two "
        f"(default: {' '.join(RECIPES['cuda'])}; CPU: without fast)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for results")
    options = parser.parse_args(arguments)
    for recipe in options.recipes or ():
        try:
            check_recipe(recipe)
        except ValueError:
            parser.error(f"unknown recipe {recipe!r}, known are {', '.join(fp8.RECIPES)}")
    complete(parser, options, RECIPES)
    return options


def complete(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    recipes: dict[str, tuple[str, ...]],  # by type of device
) -> None:
    """Refuses too few steps, and sets what was not given and depends on the device."""
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    devices.choose(options)
    if options.recipes is None:
        options.recipes = list(recipes[torch.device(options.device).type])


def in_a_block(module: nn.Module, name: str) -> bool:
    """Filter for fp8.convert: every linear but lm_head, whatever its size."""
    return name != "lm_head"


def make_variants(
    job: Job, recipes: Sequence[str], schedule: Schedule, seed: int, device: torch.device
) -> list[Variant]:
    """The baseline and one variant per recipe, all with the same initial weights."""
    torch.manual_seed(seed)
    with device:
        model = ByteModel(job.model).to(job.dtype)
    variants = []
    for recipe in recipes:
        converted = fp8.convert(
            copy.deepcopy(model), recipe=recipe, filter=in_a_block if job.small else None
        )
        variants.append(make_variant(recipe, converted, schedule))
    name = f"{str(job.dtype).removeprefix('torch.')} nn.Linear"
    return [make_variant(name, model, schedule), *variants]


def held_out_batches(text: Text, job: Job) -> list[Batch]:
    """The batches on which every variant is judged after training."""
    return [text.held_out_batch(i, job.batch, job.length) for i in range(HELD_OUT_BATCHES)]


def verdict(variants: Sequence[Variant]) -> str:
    """One line: did each recipe end close to the baseline?"""
    baseline, *recipes = variants
    off = {variant.name: abs(variant.held_out - baseline.held_out) for variant in recipes}
    far = [f"{name} ({gap:.4f})" for name, gap in off.items() if gap > CLOSE]
    if not recipes:
        return "Result: no FP8 recipe was asked for."
    if far:
        return f"Result: further than {CLOSE} nats per byte from {baseline.name}: {', '.join(far)}."
    return (
        f"Result: each FP8 recipe stayed within {CLOSE} nats per byte of {baseline.name} "
        f"on held-out text (largest difference {max(off.values()):.4f})."
    )


def describe(job: Job, text: Text, model: nn.Module, device: torch.device, steps: int) -> str:
    """What is about to be trained, on what."""
    size = job.model
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    return "\n".join(
        [
            f"device  {hardware}; torch {torch.__version__}",
            f"text    {text.files} Python files below {text.root}: {text.train.numel() / 1e6:.1f} "
            f"MB to train on, {text.held_out.numel() / 1e6:.1f} MB held out",
            f"model   {parameter_count(model) / 1e6:.1f}M parameters, {size.layers} layers, width "
            f"{size.width}, MLP {size.hidden}, {str(job.dtype).removeprefix('torch.')}",
            f"steps   {steps} of {job.batch} x {job.length} bytes, AdamW, eager mode",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    options = parse(arguments)
    job, device = JOBS[options.size], torch.device(options.device)
    steps = options.steps or job.steps
    schedule = Schedule(steps, job.learning_rate, warmup=max(1, steps // 8))
    text = load_text()
    variants = make_variants(job, options.recipes, schedule, options.seed, device)
    print(describe(job, text, variants[0].model, device, schedule.steps))
    for variant in variants[1:]:
        for line in totals(fp8.summary(variant.model)):
            print(f"{variant.name:12} {line}")
    if job.small and options.recipes:
        print("        (too small for fp8.convert's size rule: a filter takes all but lm_head)")

    quiet = not sys.stderr.isatty()
    total = schedule.steps * len(variants)
    with tqdm(total=total, unit="step", mininterval=10 if quiet else 0.2, leave=True) as bar:

        def on_step(variant: Variant) -> None:
            bar.set_postfix_str(f"{variant.name} {variant.losses[-1]:.3f}", refresh=False)
            bar.update()

        def batch_of(step: int) -> Batch:
            return text.batch(step, job.batch, job.length, options.seed)

        try:
            train(variants, batch_of, schedule, device, on_step)
        except FloatingPointError as error:
            bar.close()
            print(f"demo: {error}", file=sys.stderr)
            return 1

    held_out = held_out_batches(text, job)
    for variant in variants:
        variant.held_out = evaluate(variant.model, held_out, device)

    options.out.mkdir(parents=True, exist_ok=True)
    curves, data = options.out / "loss.png", options.out / "loss.csv"
    write_csv(data, variants)
    title = f"{parameter_count(variants[0].model) / 1e6:.1f}M-parameter byte-level transformer"
    write_plot(curves, variants, f"{title}, {device.type}, eager")
    print(f"\n{table(variants)}\n")
    print("Losses and gaps in nats per byte. gap: mean over the last tenth of the steps.")
    print("ms/step: median without the first steps. speed: against the first row.")
    print(f"curves  {curves}\ndata    {data}")
    print(verdict(variants))
    return 0


if __name__ == "__main__":
    sys.exit(main())
