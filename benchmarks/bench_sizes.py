"""Small layers: from which size on FP8 trains faster than nn.Linear. fp8.convert's rule follows.

A grid of square and oblong layers, forward + backward in bf16, with the measure that the rule
uses, K·N / (K + N) (fp8.conversion.MIN_WORK).
"""

from __future__ import annotations

import argparse
import itertools
import sys

import peers
import tables
import timing
import torch
from runs import Row, import_fp8, main
from torch import nn
from tqdm import tqdm

SIDES = (512, 1024, 1536, 2048, 3072, 4096)
OBLONG = ((1024, 4096), (4096, 1024), (1024, 14336), (14336, 1024), (1536, 6144), (2048, 8192))
TOKENS = (2048, 4096, 8192)


def work(k: int, n: int) -> int:
    return k * n // (k + n)


def measure_shape(m: int, k: int, n: int, found: peers.Peers, repeats: int) -> list[Row]:
    model = nn.Sequential(nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    steps, parameters = {}, []
    for peer in found.found:
        module = peer.build(model)
        _, steps[peer.name] = timing.forward_backward(module, x, dy)
        parameters += list(module.parameters())
    # Four steps ahead: where the GPU is the slower one, the host has caught up by then.
    both = timing.device_times(steps, repeats, before=timing.new_weights(parameters), lead=4)
    return [
        {
            "m": m,
            "k": k,
            "n": n,
            "work": work(k, n),
            "variant": name,
            "step_us": both[name].as_dict(),
            "step_speedup": both["bf16"].median / both[name].median,
        }
        for name in steps
    ]


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    # delayed is as tensorwise, and what accumulates fast in the backward too as what does not.
    recipes = import_fp8().RECIPES.values()
    found = peers.standard(
        [r.name for r in recipes if r.scaling == "dynamic" and "dgrad" not in r.fast_accum]
    )
    layers = [(side, side) for side in SIDES] + list(OBLONG)
    if options.quick:
        layers = layers[:3]
    rows: list[Row] = []
    for m, (k, n) in tqdm(list(itertools.product(TOKENS, layers)), unit="shape"):
        rows += measure_shape(m, k, n, found, 7 if options.quick else 11)
    return rows, found.skipped


def table(rows: list[Row]) -> str:
    """One line a layer, in the order of the rule's measure; a column a recipe and token count."""
    names = [n for n in dict.fromkeys(r["variant"] for r in rows) if n.startswith("fp8 ")]
    speed = {(r["m"], r["k"], r["n"], r["variant"]): r["step_speedup"] for r in rows}
    tokens = sorted({r["m"] for r in rows})
    layers = sorted({(r["work"], r["k"], r["n"]) for r in rows})
    columns = ["K → N", "K*N/(K+N)", *(f"{n[4:]}, {m}" for n in names for m in tokens)]
    lines = [
        [
            f"{k} → {n}",
            size,
            *(tables.ratio(speed[m, k, n, name]) for name in names for m in tokens),
        ]
        for size, k, n in layers
    ]
    return tables.text(columns, lines)


if __name__ == "__main__":
    sys.exit(main("sizes", __doc__.splitlines()[0], measure, table))
