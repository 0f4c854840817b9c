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


def drop_gradients(module: torch.nn.Module, x: torch.Tensor) -> None:
    x.grad = None
    for parameter in module.parameters():
        parameter.grad = None


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
    inputs = torch.cuda.memory_allocated()
    rows: list[Row] = []
    forwards, steps, parameters = {}, {}, []
    exact = None
    for peer in tqdm(found.found, unit="variant", desc="memory"):
        on_gpu = peers.Peer(peer.name, lambda m, peer=peer: peer.make(m.cuda()), peer.context)
        others = torch.cuda.memory_allocated() - inputs  # weights of the variants before this one
        try:
            module = on_gpu.build(model)
            leaf = x.detach()
            forward, step = timing.forward_backward(module, leaf, dy)
            step()
            y = forward().detach().cpu()  # not on the GPU, where it would count as memory
            row = {
                "variant": peer.name,
                "peak_gib": (timing.peak_memory(step) - others) / GIB,
                "sqnr_db": None if exact is None else timing.sqnr(y, exact),
                "host_ms": host_ms(step),
            }
        except Exception as error:  # a peer that fails is named, not fatal
            found.skipped[peer.name] = str(error).splitlines()[0]
            continue
        drop_gradients(module, leaf)
        exact = y if peer.name == "bf16" else exact
        rows.append(row)
        forwards[peer.name], steps[peer.name] = forward, step
        parameters += list(module.parameters())
        gc.collect()

    # All variants are resident and take turns, so that clocks and power treat them alike.
    touch = timing.new_weights(parameters)
    repeats = 6 if options.quick else 12
    with tqdm(total=2 * repeats, unit="round", desc="time") as bar:
        settings = {"before": touch, "progress": bar.update, "lead": 1}
        fwd = timing.device_times(forwards, repeats, **settings)
        both = timing.device_times(steps, repeats, **settings)
    for row in rows:
        name = row["variant"]
        row["forward_us"], row["step_us"] = fwd[name].as_dict(), both[name].as_dict()
        row["speedup"] = both["bf16"].median / both[name].median
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
