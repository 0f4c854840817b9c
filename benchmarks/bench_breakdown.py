"""Where a training step's time goes: kernels by class, the rest of the step, the host's time.

One linear layer at three shapes, and two Llama-3-8B decoder layers at 2 x 4096 tokens; bf16 and
fp8, tensorwise and rowwise. Kernel times are from torch.profiler. The span of a step is measured
without the profiler, over steps queued back to back as in training. The rest is what is left of
it: gaps between kernels, and that a busy GPU lowers its clocks, more than one that the profiler
lets rest between kernels.
Host ms: until backward() returned, the GPU not awaited.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import kernel_times
import llama
import peers
import tables
import timing
import torch
from runs import Row, main
from shapes import LLAMA_8B, RECIPES, BlockShape, DecoderCase, LinearShape
from torch import nn
from tqdm import tqdm

LAYERS = (
    LinearShape(8192, 4096, 14336),
    LinearShape(8192, 4096, 4096),
    LinearShape(2048, 4096, 14336),
)
DECODER = LLAMA_8B


def layer(shape: LinearShape) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The model, x and dy."""
    m, k, n = shape
    model = nn.Sequential(nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16))
    x, dy = (torch.randn(m, size, device="cuda", dtype=torch.bfloat16) for size in (k, n))
    return model, x, dy


def decoder(shape: BlockShape) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    size = (shape.sequences, shape.tokens, shape.hidden)
    x, dy = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return llama.decoder(shape), x, dy


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            step()

    return run


@dataclass
class Timed:
    """A case, measured without the profiler: by variant the step, and its times in us."""

    name: str
    in_a_row: int
    steps: dict[str, Callable[[], object]]
    tuned: dict[str, bool]
    spans: dict[str, float]
    hosts: dict[str, float]


def time_case(
    name: str,
    made: tuple[nn.Module, torch.Tensor, torch.Tensor],
    tokens: int,
    in_a_row: int,
    everything: bool,
    options: argparse.Namespace,
) -> Timed:
    """in_a_row: steps that are queued back to back. One flush of the L2 among them counts little.
    everything: see peers.ours."""
    model, x, dy = made
    steps, tuned = {}, {}
    for peer in peers.standard(RECIPES[:2], everything=everything).found:
        module = peer.build(model)
        tuned[peer.name] = peers.autotune(module, tokens, not options.no_autotune)
        new = timing.new_weights(module.parameters())
        _, step = timing.forward_backward(module, x, dy)
        steps[peer.name] = lambda new=new, step=step: (new(), step())
    runs = {variant: repeated(step, in_a_row) for variant, step in steps.items()}
    spans = timing.device_times(runs, 5 if options.quick else 9, warmup=1, lead=1)
    hosts = timing.host_times(steps, 10, calls=1, warmup=1)
    return Timed(
        name,
        in_a_row,
        steps,
        tuned,
        {variant: found.median / in_a_row for variant, found in spans.items()},
        {variant: found.median for variant, found in hosts.items()},
    )


def profiled(case: Timed) -> list[Row]:
    rows: list[Row] = []
    for variant, step in case.steps.items():
        kernels = kernel_times.profile(step, case.in_a_row)
        found = kernel_times.per_step(kernels, case.in_a_row)
        span = case.spans[variant]
        busy = sum(found[f"{group}_us"] for group in kernel_times.CLASSES)
        rows.append(
            {
                "case": case.name,
                "variant": variant,
                "autotuned": case.tuned[variant],
                "span_us": span,
                **found,
                "rest_us": max(0.0, span - busy),
                "host_us": case.hosts[variant],
                "speedup": case.spans["bf16"] / span,
            }
        )
    return rows


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    layers = LAYERS[:1] if options.quick else LAYERS
    cases: list[tuple[str, Callable, int, int, bool]] = [
        (f"M={shape}", lambda shape=shape: layer(shape), shape.m, 20, True) for shape in layers
    ]
    name = f"{DECODER.layers} layers of {DecoderCase('8B', DECODER)}"
    cases.append((name, lambda: decoder(DECODER), DECODER.rows, 3, False))
    # All cases are timed before the first is profiled: launches may stay slower once CUPTI is on.
    timed = [
        time_case(name, make(), *how, options)
        for name, make, *how in tqdm(cases, unit="case", desc="time")
    ]
    # The profile that starts CUPTI may lose what runs meanwhile.
    warm = torch.zeros(1 << 20, device="cuda")
    kernel_times.profile(warm.zero_, 2)
    rows: list[Row] = []
    for case in tqdm(timed, unit="case", desc="profile"):
        rows += profiled(case)
    return rows, {}


def table(rows: list[Row]) -> str:
    columns = ["case", "variant", "step ms", *kernel_times.CLASSES, "rest", "host ms", "kernels"]
    lines = [
        [
            row["case"],
            row["variant"],
            row["span_us"] / 1e3,
            *(row[f"{group}_us"] / 1e3 for group in (*kernel_times.CLASSES, "rest")),
            row["host_us"] / 1e3,
            row["kernels"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


if __name__ == "__main__":
    sys.exit(main("breakdown", __doc__.splitlines()[0], measure, table, peers.autotune_argument))
