"""Llama 3 decoder layers of 8B and 70B, 8192 tokens, contexts of 2k and 4k: speed, peak memory.

nn.Linear against fp8.convert (fused_linear) with each recipe, and the peers that can be imported.
Two layers of 8B, one of 70B. The weights count as new before each step. Host ms: until backward()
returned, the GPU not awaited. Peak memory: weights, gradients and activations of that variant.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time

import llama
import memory
import peers
import tables
import timing
import torch
from runs import Row, main
from shapes import RECIPES, DecoderCase, case_name, decoder_cases
from tqdm import tqdm


def host_ms(step, repeats: int = 5) -> float:
    """Of one step on an idle GPU; more would fill the launch queue."""
    return timing.host_times({"step": step}, repeats, calls=1, warmup=1)["step"].median / 1e3


def measure_case(
    case: DecoderCase, options: argparse.Namespace, deadline: float, skipped: Row
) -> list[Row]:
    shape = case.shape
    found = peers.standard(RECIPES, () if options.no_peers else case.peers, everything=False)
    skipped |= found.skipped
    model = llama.decoder(shape)
    size = (shape.sequences, shape.tokens, shape.hidden)
    x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    data = x.nbytes + dy.nbytes
    rows: list[Row] = []
    forwards, steps, parameters = {}, {}, []
    exact = None
    for peer in tqdm(found.found, unit="variant", desc=f"{case}: memory", leave=False):
        name = f"{peer.name} at {case}"
        if peers.too_late(peer, deadline):
            skipped[name] = "the time budget was spent"
            continue
        others = memory.resident() - data  # the model, the variants before this one
        try:
            module = peer.build(model)
            tuned = peers.autotune(module, shape.rows, not options.no_autotune)
            forward, step = timing.forward_backward(module, x, dy)
            for _ in range(peer.settle):
                step()
            peak = memory.peak(step) - others
            y = forward().detach()  # after the peak, in which it would count
            row = {
                "model": case.model,
                "layers": shape.layers,
                "sequences": shape.sequences,
                "context": shape.tokens,
                "rotary": shape.rotary,
                "variant": peer.name,
                "autotuned": tuned,
                "peak_gib": peak / memory.GIB,
                "sqnr_db": None if exact is None else timing.sqnr(y, exact),
                "host_ms": host_ms(step),
            }
        except Exception as error:  # a peer that fails is named, not fatal
            skipped[name] = peers.reason(error)
            module = forward = step = None  # or the next variant's memory would be too small
            gc.collect()
            continue
        memory.drop_gradients(module)
        exact = y if peer.name == "bf16" else exact
        rows.append(row)
        forwards[peer.name], steps[peer.name] = forward, step
        parameters += list(module.parameters())
        gc.collect()

    # All variants are resident and take turns, so that clocks and power treat them alike.
    touch = timing.new_weights(parameters)
    repeats = options.repeats or (5 if options.quick else 9)
    with tqdm(total=2 * repeats, unit="round", desc=f"{case}: time", leave=False) as bar:
        settings = {"warmup": 1, "before": touch, "progress": bar.update, "lead": 1}
        fwd = timing.device_times(forwards, repeats, **settings)
        both = timing.device_times(steps, repeats, **settings)
    for row in rows:
        name = row["variant"]
        row["forward_us"], row["step_us"] = fwd[name].as_dict(), both[name].as_dict()
        row["speedup"] = both["bf16"].median / both[name].median
        row["peak_ratio"] = row["peak_gib"] / rows[0]["peak_gib"]
    return rows


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    rows: list[Row] = []
    skipped: Row = {}
    deadline = time.monotonic() + options.budget
    for case in tqdm(decoder_cases(options.quick), unit="case"):
        try:
            rows += measure_case(case, options, deadline, skipped)
        except RuntimeError as error:  # out of memory: the other cases are still worth having
            skipped[str(case)] = peers.reason(error)
        memory.free()
    return rows, skipped


def case_of(row: Row) -> str:
    return case_name(row["model"], row["sequences"], row["context"], row["rotary"])


def table(rows: list[Row]) -> str:
    columns = [
        "case",
        "variant",
        "fwd ms",
        "fwd+bwd ms",
        "x bf16",
        "spread",
        "host ms",
        "peak GiB",
        "x bf16",
        "SQNR dB",
    ]
    lines = [
        [
            case_of(row),
            row["variant"],
            row["forward_us"]["median"] / 1e3,
            row["step_us"]["median"] / 1e3,
            tables.ratio(row["speedup"]),
            tables.spread(row["step_us"]),
            row["host_ms"],
            row["peak_gib"],
            tables.ratio(row["peak_ratio"]),
            row["sqnr_db"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-peers", action="store_true", help="nn.Linear and fp8 only")
    parser.add_argument("--repeats", type=int, help="timed calls per variant")
    peers.autotune_argument(parser)
    peers.budget_argument(parser, 150)


if __name__ == "__main__":
    sys.exit(main("block", __doc__.splitlines()[0], measure, table, arguments))
