"""Mixtures of experts: train transformers' Mixtral and Qwen3-MoE, small and from random weights, in
high precision and in FP8, and compare.

The models are transformers' own classes, trained eagerly from the same weights on the same batches;
fp8.convert sees to experts and linears alike. Nothing is downloaded. Run it with `make demo-moe`,
or `PYTHONPATH=python python examples/train_moe.py --help`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fp8
from byte_model import parameter_count
from comparison import Batch, Schedule, Variant, evaluate, make_variant, train
from stdlib_text import Text, load_text
from train import HELD_OUT_BATCHES, verdict
from training_report import table, write_csv, write_plot


@dataclass(frozen=True)
class Job:
    """Two models with the amount of training that suits a kind of device."""

    mixtral: dict[str, int]
    qwen3_moe: dict[str, int]
    batch: int  # sequences a step
    length: int  # bytes a sequence
    steps: int
    learning_rate: float
    dtype: torch.dtype
    small: bool  # linears below the size rule of fp8.convert: convert them all the same


def _sizes(hidden: int, layers: int, heads: int, **experts: int) -> dict[str, int]:
    return {
        "vocab_size": 256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": hidden // heads,
        **experts,
    }


def _mixtral(hidden: int, layers: int, heads: int, features: int) -> dict[str, int]:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return _sizes(hidden, layers, heads, intermediate_size=features, **experts)


def _qwen3(hidden: int, layers: int, heads: int, features: int, experts: int) -> dict[str, int]:
    counts = {"num_experts": experts, "num_experts_per_tok": min(8, experts // 4)}
    return _sizes(
        hidden,
        layers,
        heads,
        intermediate_size=features,
        moe_intermediate_size=features,
        **counts,
    )


JOBS = {
    "tiny": Job(
        _mixtral(32, 1, 2, 32), _qwen3(32, 1, 2, 16, 8), 4, 32, 10, 4e-3, torch.float32, small=True
    ),
    "cpu": Job(
        _mixtral(128, 2, 4, 192),
        _qwen3(128, 2, 4, 64, 16),
        *(8, 96, 80, 1e-3, torch.float32),
        small=True,
    ),
    "gpu": Job(
        _mixtral(2048, 3, 16, 7168),
        _qwen3(2048, 3, 16, 768, 128),
        *(8, 1024, 100, 3e-4, torch.bfloat16),
        small=False,
    ),
}


class Logits(nn.Module):
    """Token ids [batch, length] to logits: what the training loop calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--size", choices=JOBS, help="models and batch (default: cpu or gpu)")
    parser.add_argument("--steps", type=int, help="training steps of each variant")
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=list(fp8.RECIPES),
        default=["rowwise", "rowwise_gw_hp"],
        help="of fp8.convert (default: rowwise rowwise_gw_hp)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("build/demo-moe"), help="results folder")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.size is None:
        options.size = "cpu" if options.device == "cpu" else "gpu"
    return options


def make_model(family: str, sizes: dict[str, Any], job: Job, device: torch.device) -> nn.Module:
    """transformers' class, randomly initialized, its experts run by grouped_mm."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=job.length)
    with device:
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(job.dtype)
    model.set_experts_implementation("grouped_mm")
    return Logits(model.train())


def not_the_head(module: nn.Module, name: str) -> bool:
    """Filter for fp8.convert: experts and every linear but lm_head, whatever its size."""
    return not name.endswith("lm_head")


def compare(
    family: str, job: Job, options: argparse.Namespace, text: Text, schedule: Schedule
) -> list[Variant]:
    """Trains the baseline and one variant per recipe, all with the same initial weights."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    sizes = job.mixtral if family == "Mixtral" else job.qwen3_moe
    model = make_model(family, sizes, job, device)
    dtype = str(job.dtype).removeprefix("torch.")
    variants = [make_variant(f"{dtype} grouped_mm", model, schedule)]
    for recipe in options.recipes:
        converted = fp8.convert(
            copy.deepcopy(model), recipe, filter=not_the_head if job.small else None
        )
        variants.append(make_variant(f"fp8 {recipe}", converted, schedule))
    print(f"\n{family}: {parameter_count(model) / 1e6:.1f}M parameters, {dtype}")
    for line in fp8.summary(variants[-1].model).splitlines()[-2:]:
        print(f"  {line}")

    def batch_of(step: int) -> Batch:
        return text.batch(step, job.batch, job.length, options.seed)

    quiet = not sys.stderr.isatty()
    total = schedule.steps * len(variants)
    with tqdm(total=total, unit="step", mininterval=10 if quiet else 0.2) as bar:
        train(variants, batch_of, schedule, device, lambda variant: bar.update())
    batches = [text.held_out_batch(i, job.batch, job.length) for i in range(HELD_OUT_BATCHES)]
    for variant in variants:
        variant.held_out = evaluate(variant.model, batches, device)
    return variants


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both comparisons; returns the exit status."""
    options = parse(arguments)
    try:
        import transformers
    except ImportError:
        print("demo-moe: needs transformers (pip install -r requirements.txt)", file=sys.stderr)
        return 1
    job = JOBS[options.size]
    steps = options.steps or job.steps
    schedule = Schedule(steps, job.learning_rate, warmup=max(1, steps // 8))
    text = load_text()
    where = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{steps} steps of {job.batch} x {job.length} bytes, AdamW, eager mode")
    options.out.mkdir(parents=True, exist_ok=True)
    verdicts = []
    for family in ("Mixtral", "Qwen3Moe"):
        try:
            variants = compare(family, job, options, text, schedule)
        except FloatingPointError as error:
            print(f"demo-moe: {error}", file=sys.stderr)
            return 1
        name = family.lower()
        write_csv(options.out / f"{name}.csv", variants)
        plot = options.out / f"{name}.png"
        size = parameter_count(variants[0].model) / 1e6
        write_plot(plot, variants, f"{family}, {size:.1f}M parameters, {options.device}, eager")
        print(f"\n{table(variants)}\ncurves  {plot}")
        verdicts.append(f"{family}: {verdict(variants)}")
        del variants
        if options.device != "cpu":
            torch.cuda.empty_cache()
    print("\nLosses and gaps in nats per byte. gap: mean over the last tenth of the steps.")
    print("\n".join(verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
