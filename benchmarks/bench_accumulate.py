"""Gradient accumulation over 4 micro-batches, with and without fp8.cached_weights around them.

Two Llama-3-8B decoder layers on one sequence of 2k or 4k tokens a micro-batch. Gradients start
empty and add up, and the weights count as new before each round of four, as an optimizer leaves
them. Inside cached_weights each weight is quantized once a round, not once a micro-batch.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import llama
import memory
import peers
import tables
import timing
import torch
from runs import Row, import_fp8, main
from shapes import LLAMA_8B, MICRO_BATCHES, MICRO_TOKENS, RECIPES, BlockShape
from torch import Tensor, nn
from tqdm import tqdm

CACHED = ", cached weights"


def accumulation(
    module: nn.Module,
    micro_batches: list[Tensor],
    dy: Tensor,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[[], None]:
    """A call of all micro-batches, forward and backward, inside one context. Each micro-batch
    [1, tokens, hidden] needs a gradient of its own, as behind an embedding."""
    leaves = [x.detach().requires_grad_() for x in micro_batches]

    def run() -> None:
        memory.drop_gradients(module)
        with context():
            for leaf in leaves:
                module(leaf).backward(dy)
                leaf.grad = None

    return run


def measure_shape(shape: BlockShape, options: argparse.Namespace) -> list[Row]:
    fp8 = import_fp8()
    model = llama.decoder(shape)
    size = (shape.sequences, shape.tokens, shape.hidden)
    xs = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(MICRO_BATCHES)]
    dy = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    data = sum(x.nbytes for x in [*xs, dy])
    rounds: dict[str, Callable[[], None]] = {}
    rows: list[Row] = []
    parameters = []
    for peer in peers.standard(RECIPES[:2], everything=False).found:
        others = memory.resident() - data
        module = peer.build(model)
        tuned = peers.autotune(module, shape.rows, not options.no_autotune)
        forms = {peer.name: nullcontext}
        if peer.name != "bf16":
            forms[peer.name + CACHED] = partial(fp8.cached_weights, module)
        for name, context in forms.items():
            run = accumulation(module, xs, dy, context)
            rows.append(
                {
                    "micro_batches": MICRO_BATCHES,
                    "sequences": shape.sequences,
                    "context": shape.tokens,
                    "variant": name,
                    "autotuned": tuned,
                    "peak_gib": (memory.peak(run) - others) / memory.GIB,
                }
            )
            rounds[name] = run
        memory.drop_gradients(module)
        parameters += list(module.parameters())
        gc.collect()
    touch = timing.new_weights(parameters)
    repeats = 5 if options.quick else 9
    times = timing.device_times(rounds, repeats, warmup=1, before=touch, lead=1)
    for row in rows:
        name = row["variant"]
        plain = times[name.removesuffix(CACHED)].median
        row["round_us"] = times[name].as_dict()
        row["micro_us"] = times[name].median / MICRO_BATCHES
        row["speedup"] = times["bf16"].median / times[name].median
        row["of_uncached"] = plain / times[name].median if name.endswith(CACHED) else None
        row["peak_ratio"] = row["peak_gib"] / rows[0]["peak_gib"]
    return rows


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    rows: list[Row] = []
    for tokens in tqdm(MICRO_TOKENS[:1] if options.quick else MICRO_TOKENS, unit="size"):
        rows += measure_shape(LLAMA_8B._replace(sequences=1, tokens=tokens), options)
        memory.free()
    return rows, {}


def table(rows: list[Row]) -> str:
    columns = [
        "micro-batch",
        "variant",
        "ms each",
        "x bf16",
        "x not cached",
        "spread",
        "peak GiB",
        "x bf16",
    ]
    lines = [
        [
            f"{row['sequences']} × {row['context']}",
            row["variant"],
            row["micro_us"] / 1e3,
            tables.ratio(row["speedup"]),
            tables.ratio(row["of_uncached"]),
            tables.spread(row["round_us"]),
            row["peak_gib"],
            tables.ratio(row["peak_ratio"]),
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


if __name__ == "__main__":
    sys.exit(main("accumulate", __doc__.splitlines()[0], measure, table, peers.autotune_argument))
