"""Host time of one small layer: Linear(256, 256) on 16 tokens, where the GPU has nothing to do.

fused_linear through fp8.Linear, forward (no_grad), forward with a graph, and forward + backward,
against nn.Linear and the peers in the same run, with a bias and without. A compiled peer is warmed
up only while the time budget lasts.
"""

from __future__ import annotations

import argparse
import sys
import time

import peers
import tables
import timing
import torch
from runs import Row, main
from shapes import RECIPES
from torch import nn
from tqdm import tqdm

TOKENS, FEATURES = 16, 256
PEERS = ("torchao tensorwise compiled", "torchao rowwise compiled", "TE delayed", "TE current")
WHATS = ("forward_us", "graph_us", "step_us")


def warm_up(found: peers.Peers, bias: bool, deadline: float, skipped: Row) -> dict[str, tuple]:
    """Of each variant: forward under no_grad, forward, step, and its parameters."""
    model = nn.Sequential(
        nn.Linear(FEATURES, FEATURES, bias=bias, device="cuda", dtype=torch.bfloat16)
    )
    x = torch.randn(TOKENS, FEATURES, device="cuda", dtype=torch.bfloat16)
    ready = {}
    for peer in tqdm(found.found, desc=f"warm-up, bias={bias}", unit="variant"):
        name = f"{peer.name}, bias={bias}"
        if peers.too_late(peer, deadline):
            skipped[name] = "the time budget was spent"
            continue
        try:
            module = peer.build(model)
            forward, step = timing.forward_backward(module, x, torch.randn_like(x))
            inference = torch.no_grad()(forward)
            for run in (step, inference, step, inference):
                run()
        except Exception as error:  # a peer that fails is named, not fatal
            skipped[name] = peers.reason(error)
            continue
        ready[peer.name] = (inference, forward, step, list(module.parameters()))
    return ready


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    deadline = time.monotonic() + options.budget
    found = peers.standard(RECIPES, () if options.quick else PEERS)
    skipped = dict(found.skipped)
    # Without a bias first: those are Llama's layers, should the budget end.
    ready = {bias: warm_up(found, bias, deadline, skipped) for bias in (False, True)}
    repeats = 10 if options.quick else 30
    rows: list[Row] = []
    with tqdm(total=len(ready) * len(WHATS) * repeats, desc="time", unit="round") as bar:
        for bias, variants in ready.items():
            touch = timing.new_weights(
                [p for *_, parameters in variants.values() for p in parameters]
            )
            results = {
                what: timing.host_times(
                    {name: calls[i] for name, calls in variants.items()},
                    repeats,
                    before=touch,
                    progress=bar.update,
                )
                for i, what in enumerate(WHATS)
            }
            step = {name: found.median for name, found in results["step_us"].items()}
            rows += [
                {
                    "variant": name,
                    "bias": bias,
                    **{what: results[what][name].as_dict() for what in WHATS},
                    "step_ratio": step[name] / step["bf16"],
                }
                for name in variants
            ]
    return rows, skipped


def table(rows: list[Row]) -> str:
    columns = ["variant", "bias", "forward us", "with graph us", "fwd+bwd us", "x nn.Linear"]
    lines = [
        [
            row["variant"],
            "yes" if row["bias"] else "no",
            *(row[what]["median"] for what in WHATS),
            tables.ratio(row["step_ratio"]),
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


def arguments(parser: argparse.ArgumentParser) -> None:
    peers.budget_argument(parser, 15)


if __name__ == "__main__":
    sys.exit(main("host", __doc__.splitlines()[0], measure, table, arguments))
