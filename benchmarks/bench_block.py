"""Two Llama-3-8B decoder layers, 2 x 4096 tokens: ms forward, ms forward + backward, peak memory.

nn.Linear against fp8.convert (fused_linear) with each recipe, and the peers that can be imported.
The weights count as new before each step. Host ms: until backward() returned, the GPU not awaited.
"""

from __future__ import annotations

import argparse
import gc
import sys

import llama
import peers
import tables
import timing
import torch
from runs import Row, main
from shapes import RECIPES, BlockShape
from tqdm import tqdm

GIB = 2**30


def host_ms(step, repeats: int = 5) -> float:
    """Of one step on an idle GPU; more would fill the launch queue."""
    return timing.host_times({"step": step}, repeats, calls=1, warmup=1)["step"].median / 1e3


def measure_variant(peer: peers.Peer, model, x, dy, exact, repeats: int) -> Row:
    """One variant at a time holds its weights, else the peak would count all of them."""
    module = peer.build(model)
    forward, step = timing.forward_backward(module, x, dy)
    touch = timing.new_weights(module.parameters())
    step()
    y = forward().detach().cpu()  # not on the GPU, where it would count as memory
    fwd = timing.device_times({"forward": forward}, repeats, before=touch)["forward"]
    both = timing.device_times({"step": step}, repeats, before=touch)["step"]
    row = {
        "variant": peer.name,
        "forward_us": fwd.as_dict(),
        "step_us": both.as_dict(),
        "host_ms": host_ms(step),
        "peak_gib": timing.peak_memory(step) / GIB,
        "sqnr_db": None if exact is None else timing.sqnr(y, exact),
    }
    return row | {"y": y}


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    shape = BlockShape(layers=1) if options.quick else BlockShape()
    wanted = [("bf16", peers.baseline)]
    wanted += [(f"fp8 {r}", lambda r=r: peers.ours(r, everything=False)) for r in RECIPES]
    if not options.no_peers:
        wanted += peers.others(compiled=not options.quick)
    found = peers.gather(*wanted)
    model = llama.decoder(shape, "cpu")  # each variant copies it to the GPU
    size = (shape.sequences, shape.tokens, shape.hidden)
    x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    rows: list[Row] = []
    exact = None
    for peer in tqdm(found.found, unit="variant"):
        on_gpu = peers.Peer(peer.name, lambda m, peer=peer: peer.make(m.cuda()), peer.context)
        try:
            row = measure_variant(on_gpu, model, x, dy, exact, 5 if options.quick else 10)
        except Exception as error:  # a peer that fails is named, not fatal
            found.skipped[peer.name] = str(error).splitlines()[0]
            continue
        y = row.pop("y")
        exact = y if peer.name == "bf16" else exact
        rows.append(row)
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    for row in rows:
        row["speedup"] = rows[0]["step_us"]["median"] / row["step_us"]["median"]
        row["peak_ratio"] = row["peak_gib"] / rows[0]["peak_gib"]
    return rows, found.skipped


def table(rows: list[Row]) -> str:
    columns = [
        "variant",
        "fwd ms",
        "fwd+bwd ms",
        "x bf16",
        "host ms",
        "peak GiB",
        "x bf16",
        "SQNR dB",
    ]
    lines = [
        [
            row["variant"],
            row["forward_us"]["median"] / 1e3,
            row["step_us"]["median"] / 1e3,
            tables.ratio(row["speedup"]),
            row["host_ms"],
            row["peak_gib"],
            tables.ratio(row["peak_ratio"]),
            row["sqnr_db"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-peers", action="store_true", help="nn.Linear and fp8 only")


if __name__ == "__main__":
    sys.exit(main("block", __doc__.splitlines()[0], measure, table, arguments))
