"""One linear layer, forward and forward + backward, against nn.Linear and the peers.

Runs fused_linear with each recipe on Llama 3's shapes, and some of them over the number of tokens
("sweep": "tokens"; bf16, tensorwise, rowwise and delayed only). The weight counts as new before
every step, as under an optimizer, so that nothing is kept between steps. "GEMMs alone" is the
ceiling: the three FP8 products on operands quantized beforehand, with cuBLASLt's first choice of
algorithm, which fp8.autotune may beat; by torch._scaled_mm, which has no blocks: those by
fp8::scaled_mm.
"""

from __future__ import annotations

import argparse
import sys

import memory
import peers
import tables
import timing
import torch
from runs import Row, main
from shapes import RECIPES, LinearShape, main_shapes, sweep_shapes
from torch import nn
from tqdm import tqdm

# Ceilings, and the recipe that each is one of.
CEILINGS = {
    "GEMMs alone": "tensorwise",
    "GEMMs alone, rowwise": "rowwise",
    "GEMMs alone, blockwise": "blockwise",
}

FEW = ("tensorwise", "rowwise", "delayed")  # over the number of tokens

# Of the same variant before each timed call: slow peers among the variants let the GPU rest.
LEAD_MS = {"main": 10.0, "tokens": 5.0}


def gemms_alone(shape: LinearShape, recipe: str):
    """Calls of fprop, and of fprop, dgrad and wgrad, on FP8 operands that exist already."""
    ops = torch.ops.fp8
    rowwise, blockwise = recipe == "rowwise", recipe == "blockwise"
    quantize = ops.quantize_blockwise_1x128 if blockwise else getattr(ops, f"quantize_{recipe}")
    quantize_weight = ops.quantize_blockwise_128x128 if blockwise else quantize
    m, k, n = shape

    def operand(rows: int, cols: int, dtype=torch.float8_e4m3fn, quantize=quantize):
        return quantize(torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16), dtype)

    def product(a, b, fast: bool):
        (data_a, scale_a), (data_b, scale_b) = a, b
        if blockwise:
            return lambda: ops.scaled_mm(data_a, data_b, scale_a, scale_b)
        scale_b = scale_b.t().contiguous() if rowwise else scale_b

        def call():
            return torch._scaled_mm(
                data_a, data_b.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
            )

        return call

    grad = torch.float8_e5m2 if recipe == "tensorwise" else torch.float8_e4m3fn
    fprop = product(operand(m, k), operand(n, k, quantize=quantize_weight), True)
    dgrad = product(operand(m, n, grad), operand(k, n, quantize=quantize_weight), False)
    wgrad = product(operand(n, m, grad), operand(k, m), False)

    def step():
        fprop()
        dgrad()
        wgrad()

    return fprop, step


def measure_shape(
    shape: LinearShape, sweep: str, found: peers.Peers, options: argparse.Namespace
) -> list[Row]:
    m, k, n = shape
    # The container lets peers replace the layer.
    model = nn.Sequential(nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    rows_checked = slice(0, 256)  # fp64 of the whole product would take longer than the benchmark
    exact = x[rows_checked].double() @ model[0].weight.detach().double().t()
    forwards, steps, noise, tuned, parameters = {}, {}, {}, {}, []
    for peer in list(found.found):
        try:
            module = peer.build(model)
            tuned[peer.name] = peers.autotune(module, m, not options.no_autotune)
            forward, step = timing.forward_backward(module, x, dy)
            for _ in range(peer.settle + 1):
                step()
            noise[peer.name] = timing.sqnr(forward()[rows_checked].detach(), exact)
        except Exception as error:  # a peer that fails is named, not fatal
            found.skipped[f"{peer.name} at {shape}"] = peers.reason(error)
            continue
        forwards[peer.name], steps[peer.name] = forward, step
        parameters += list(module.parameters())
    for name, recipe in CEILINGS.items():
        if f"fp8 {recipe}" in steps:
            forwards[name], steps[name] = gemms_alone(shape, recipe)
    touch = timing.new_weights(parameters)
    repeats = options.repeats or (15 if sweep == "main" and not options.quick else 9)
    settings = {"before": touch, "lead": 1, "lead_ms": LEAD_MS[sweep]}
    fwd = timing.device_times(forwards, repeats, **settings)
    both = timing.device_times(steps, repeats, **settings)
    return [
        {
            "sweep": sweep,
            "m": m,
            "k": k,
            "n": n,
            "variant": name,
            "autotuned": tuned.get(name, False),
            "forward_us": fwd[name].as_dict(),
            "step_us": both[name].as_dict(),
            "forward_speedup": fwd["bf16"].median / fwd[name].median,
            "step_speedup": both["bf16"].median / both[name].median,
            "sqnr_db": noise.get(name),
        }
        for name in steps
    ]


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    recipes = options.recipes or RECIPES
    # Nothing in one bf16 linear is left for a compiler to gain.
    others = [name for name in peers.PEERS if name != "bf16 compiled"]
    if options.quick:
        others = [name for name in others if not name.endswith("compiled")]
    found = peers.standard(recipes, () if options.no_peers else others)
    few = peers.standard([recipe for recipe in recipes if recipe in FEW])
    wanted = [("main", shape, found) for shape in main_shapes(options.quick)]
    wanted += [("tokens", shape, few) for shape in sweep_shapes(options.quick)]
    rows: list[Row] = []
    for sweep, shape, variants in tqdm(wanted, unit="shape"):
        rows += measure_shape(shape, sweep, variants, options)
        memory.free()
    return rows, found.skipped | few.skipped


def table(rows: list[Row]) -> str:
    columns = ["M, K → N", "variant", *tables.STEP_COLUMNS, "SQNR dB"]
    lines = [
        [
            f"{row['m']}, {row['k']} → {row['n']}",
            row["variant"],
            *tables.step_cells(row),
            row["sqnr_db"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="default: all")
    parser.add_argument("--repeats", type=int, help="timed calls per variant")
    parser.add_argument("--no-peers", action="store_true", help="nn.Linear and fp8 only")
    peers.autotune_argument(parser)


if __name__ == "__main__":
    sys.exit(main("linear", __doc__.splitlines()[0], measure, table, arguments))
