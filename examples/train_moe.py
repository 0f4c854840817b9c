"""Mixture-of-experts models from Hugging Face transformers, trained with and without FP8 experts.

A Mixtral and a Qwen3-MoE, made from config objects with random weights (nothing is downloaded), on
the text of the main demo, byte by byte. Same initial weights, same batches, plain eager PyTorch.
The baseline's experts run as transformers runs them, `grouped_mm`. Run it with `make demo-moe`, or
`PYTHONPATH=python python examples/train_moe.py --help`. With `--seeds 3` every variant trains from
three seeds: is FP8's loss within the noise between them?
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fp8
import seed_report
from byte_model import parameter_count
from comparison import Batch, Schedule, Variant, evaluate, make_variant, train
from stdlib_text import VOCABULARY, Text, load_text
from train import HELD_OUT_BATCHES, complete, verdict
from training_report import table, totals, write_csv, write_plot

RECIPES = {
    # Nothing accumulates fast there.
    "cpu": tuple(r for r in fp8.GROUPED_RECIPES if "dgrad" not in fp8.RECIPES[r].fast_accum),
    "cuda": ("rowwise", "rowwise_fast", "rowwise_gw_hp", "blockwise"),
}
FAMILIES = ("mixtral", "qwen3_moe")
TITLES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE"}


@dataclass(frozen=True)
class Job:
    """Models with the amount of training that suits a kind of device. Width, experts, choices per
    token and width inside an expert are those of each family in turn."""

    sizes: dict[str, tuple[int, int, int, int]]
    layers: int
    heads: int
    batch: int  # sequences a step
    length: int  # bytes a sequence
    steps: int
    learning_rate: float
    dtype: torch.dtype
    small: bool  # modules below the size rules of fp8.convert: convert them all the same


JOBS = {
    "tiny": Job(
        {"mixtral": (32, 4, 2, 48), "qwen3_moe": (32, 8, 2, 32)},
        *(1, 2, 4, 32, 12, 3e-3, torch.float32),
        small=True,
    ),
    "cpu": Job(
        {"mixtral": (128, 8, 2, 256), "qwen3_moe": (128, 16, 4, 96)},
        *(2, 4, 4, 128, 40, 2e-3, torch.float32),
        small=True,
    ),
    # Many steps in little time: for curves of several seeds.
    "curves": Job(
        {"mixtral": (1024, 8, 2, 1792), "qwen3_moe": (1024, 32, 4, 512)},
        *(2, 8, 8, 512, 300, 6e-4, torch.bfloat16),
        small=True,
    ),
    # 0.75 and 0.65 billion parameters; experts of the width of Mixtral-8x7B's halves, and of
    # Qwen3-30B-A3B's.
    "gpu": Job(
        {"mixtral": (2048, 8, 2, 7168), "qwen3_moe": (2048, 64, 8, 768)},
        *(2, 16, 16, 1024, 80, 3e-4, torch.bfloat16),
        small=False,
    ),
}


class Logits(nn.Module):
    """A causal language model of transformers as the training loop wants it: tokens [batch, length]
    to logits [batch, length, vocabulary]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def make_model(family: str, job: Job) -> nn.Module:
    """Random weights, from the family's config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    width, experts, choices, inner = job.sizes[family]
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": job.layers,
        "num_attention_heads": job.heads,
        "num_key_value_heads": job.heads,
        "head_dim": width // job.heads,
        "max_position_embeddings": job.length,
        "num_experts_per_tok": choices,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if family == "mixtral":
        settings |= {"num_local_experts": experts, "intermediate_size": inner}
    else:
        settings |= {
            "num_experts": experts,
            "moe_intermediate_size": inner,
            "intermediate_size": inner * choices,
            "norm_topk_prob": True,
        }
    config = AutoConfig.for_model(family, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=job.dtype)


def experts_and_attention(module: nn.Module, name: str) -> bool:
    """Filter for fp8.convert: all but lm_head, whatever the size. Routers are no nn.Linear here."""
    return not name.endswith("lm_head")


def make_variants(
    family: str,
    job: Job,
    recipes: Sequence[str],
    schedule: Schedule,
    seed: int,
    device: torch.device,
) -> list[Variant]:
    """transformers' own and one variant per recipe, all with the same initial weights."""
    torch.manual_seed(seed)
    with device:
        model = Logits(make_model(family, job))
    variants = []
    for recipe in recipes:
        converted = fp8.convert(
            copy.deepcopy(model),
            recipe=recipe,
            filter=experts_and_attention if job.small else None,
            experts_recipe=recipe,
        )
        variants.append(make_variant(recipe, converted, schedule))
    name = f"{str(job.dtype).removeprefix('torch.')} {model.model.config._experts_implementation}"
    return [make_variant(name, model, schedule), *variants]


def describe(family: str, job: Job, variants: Sequence[Variant], steps: int) -> str:
    """What is about to be trained."""
    width, experts, choices, inner = job.sizes[family]
    lines = [
        f"\nmodel   {TITLES[family]}, {parameter_count(variants[0].model) / 1e6:.1f}M parameters, "
        f"{job.layers} layers, width {width}, {experts} experts of width {inner}, {choices} a "
        "token",
        f"steps   {steps} of {job.batch} x {job.length} bytes, AdamW, eager mode",
    ]
    for variant in variants[1:]:
        lines += [f"fp8     {line}" for line in totals(fp8.summary(variant.model))]
    return "\n".join(lines)


def train_from(
    seed: int, family: str, job: Job, text: Text, options: argparse.Namespace
) -> list[Variant]:
    """One family's variants, trained and judged."""
    device = torch.device(options.device)
    steps = options.steps or job.steps
    schedule = Schedule(steps, job.learning_rate, warmup=max(1, steps // 8))
    variants = make_variants(family, job, options.recipes, schedule, seed, device)
    if seed == options.seed:
        print(describe(family, job, variants, steps))
    quiet = not sys.stderr.isatty()
    with tqdm(
        total=steps * len(variants), unit="step", mininterval=10 if quiet else 0.2, desc=family
    ) as bar:

        def batch_of(step: int) -> Batch:
            return text.batch(step, job.batch, job.length, seed)

        train(variants, batch_of, schedule, device, lambda variant: bar.update() and None)
    held_out = [text.held_out_batch(i, job.batch, job.length) for i in range(HELD_OUT_BATCHES)]
    for variant in variants:
        variant.held_out = evaluate(variant.model, held_out, device)
    return variants


def run(family: str, job: Job, text: Text, options: argparse.Namespace) -> bool:
    """Trains one family's variants, and writes what they leave behind. False where several seeds
    say that a recipe is outside of their noise."""
    seeds = []
    for seed in range(options.seed, options.seed + options.seeds):
        variants = train_from(seed, family, job, text, options)
        size = parameter_count(variants[0].model) / 1e6
        for variant in variants:
            del variant.model, variant.optimizer  # the memory is for the next seed
        seeds.append(variants)
    title = f"{size:.1f}M-parameter {TITLES[family]}, {options.device}, eager"
    options.out.mkdir(parents=True, exist_ok=True)
    if options.seeds > 1:
        runs = seed_report.by_name(seeds)
        name = f"{family}_{options.seeds}_seeds"
        seed_report.write(options.out, name, runs, f"{title}, {options.seeds} seeds")
        print(f"\n{seed_report.table(runs)}\n\ncurves  {options.out / name}.png, .csv")
        print(seed_report.verdict(runs))
        return not seed_report.outside(runs)
    curves, data = options.out / f"{family}.png", options.out / f"{family}.csv"
    write_csv(data, variants)
    write_plot(curves, variants, title)
    print(f"\n{table(variants)}\n\ncurves  {curves}\ndata    {data}\n{verdict(variants)}")
    return True


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--size", choices=JOBS, help="models and batch (default: cpu or gpu)")
    parser.add_argument("--steps", type=int, help="training steps of each variant")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--recipes",
        nargs="*",
        choices=fp8.GROUPED_RECIPES,
        metavar="RECIPE",
        help=f"of experts, to compare (default: {' '.join(RECIPES['cuda'])}; CPU: without fast)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("build/demo-moe"), help="for results")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    complete(parser, options, RECIPES)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    options = parse(arguments)
    job, text = JOBS[options.size], load_text()
    if torch.device(options.device).type == "cuda":
        hardware = torch.cuda.get_device_name(options.device)
    else:
        hardware = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    print(f"device  {hardware}; torch {torch.__version__}")
    print(f"text    {text.files} Python files below {text.root}")
    within = True
    for family in options.families:
        try:
            within = run(family, job, text, options) and within
        except FloatingPointError as error:
            print(f"demo-moe: {family}: {error}", file=sys.stderr)
            return 1
    print("\nLosses and gaps in nats per byte. gap: mean over the last tenth of the steps.")
    print("ms/step: median without the first steps. speed: against the first row.")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
