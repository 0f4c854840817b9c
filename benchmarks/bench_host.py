"""Host time of one small layer: Linear(256, 256) on 16 tokens, where the GPU has nothing to do.

fused_linear through fp8.Linear, forward (no_grad), forward with a graph, and forward + backward,
against nn.Linear and the peers in the same run.
"""

from __future__ import annotations

import argparse
import sys

import peers
import tables
import timing
import torch
from runs import Row, main
from shapes import RECIPES
from torch import nn
from tqdm import tqdm

TOKENS, FEATURES = 16, 256


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    wanted = [("bf16", peers.baseline)]
    wanted += [(f"fp8 {r}", lambda r=r: peers.ours(r)) for r in RECIPES]
    found = peers.gather(*wanted, *peers.others(compiled=not options.quick))
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(TOKENS, FEATURES, device="cuda", dtype=torch.bfloat16)
    forwards, graphs, steps, parameters = {}, {}, {}, []
    for peer in tqdm(found.found, desc="warm-up", unit="peer"):
        module = peer.build(model)
        forward, step = timing.forward_backward(module, x, torch.randn_like(x))
        try:
            for _ in range(3):
                step()
        except Exception as error:  # a peer that fails is named, not fatal
            found.skipped[peer.name] = str(error).splitlines()[0]
            continue
        forwards[peer.name] = torch.no_grad()(forward)
        graphs[peer.name], steps[peer.name] = forward, step
        parameters += list(module.parameters())
    touch = timing.new_weights(parameters)
    repeats = 10 if options.quick else 40
    results = {}
    for name, calls in (("forward_us", forwards), ("graph_us", graphs), ("step_us", steps)):
        results[name] = timing.host_times(calls, repeats, before=touch)
    rows = [
        {
            "variant": name,
            **{what: found_times[name].as_dict() for what, found_times in results.items()},
            "step_ratio": results["step_us"][name].median / results["step_us"]["bf16"].median,
        }
        for name in steps
    ]
    return rows, found.skipped


def table(rows: list[Row]) -> str:
    columns = ["variant", "forward us", "with graph us", "fwd+bwd us", "x nn.Linear"]
    lines = [
        [
            row["variant"],
            *(row[what]["median"] for what in ("forward_us", "graph_us", "step_us")),
            tables.ratio(row["step_ratio"]),
        ]
        for row in rows
    ]
    return tables.text(columns, lines)


if __name__ == "__main__":
    sys.exit(main("host", __doc__.splitlines()[0], measure, table))
