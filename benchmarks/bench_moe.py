"""The experts of a mixture, routing given, against transformers' grouped_mm in bf16.

Whole experts modules of transformers' own class, every way of running them on the same parameters
and the same routing: forward + backward with weights that count as new, and forward without a graph
with weights quantized beforehand (fp8.cached_weights). Peak memory of a step, parameters and
gradients included. Host time on a small module. torchao's prototype products take part where it is
installed, on a routing that gives every expert the same number of rows, since it asks for groups in
sixteens; its rows are compared with bf16 on that routing.

The operators behind: moe_experts; grouped_linear is what it is composed of, without the fusions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import memory
import moe
import peers
import tables
import timing
import torch
from runs import Row, import_fp8, main
from tqdm import tqdm

CHECKED_TOKENS = 64


def forward(module, variant: str, p: moe.Problem) -> torch.Tensor:
    with moe.running(module, variant):
        return module(p.x, p.index, p.weights)


def step(module, variant: str, p: moe.Problem, x: torch.Tensor, weights: torch.Tensor) -> None:
    """Gradients are replaced, as after zero_grad."""
    x.grad = weights.grad = None
    memory.drop_gradients(module)
    with moe.running(module, variant):
        y = module(x, p.index, weights)
        y.backward(p.dy)


def usable(
    module, variants: list[str], run: Callable[[str], object], skipped: Row, where: str
) -> list[str]:
    """Those that run; the others are named."""
    found = []
    for variant in variants:
        try:
            run(variant)
        except Exception as error:  # a peer that fails is named, not fatal
            skipped[f"{variant}, {where}"] = peers.reason(error)
            continue
        found.append(variant)
    return found


def measure_shape(shape: moe.MoeShape, even: bool, options, skipped: Row) -> list[Row]:
    fp8 = import_fp8()
    module = moe.experts(shape)
    p = moe.problem(shape, even)
    x, weights = (t.detach().requires_grad_() for t in (p.x, p.weights))
    variants = [moe.BF16, *(f"fp8 {recipe}" for recipe in options.recipes)]
    if even:
        variants = [moe.BF16, f"fp8 {options.recipes[0]}", moe.TORCHAO]

    def steps(variant: str) -> Callable[[], None]:
        return partial(step, module, variant, p, x, weights)

    where = f"{shape.model}, {shape.tokens} tokens"
    variants = usable(module, variants, lambda v: steps(v)(), skipped, where)
    repeats = options.repeats or (5 if options.quick else 11)
    touch = timing.new_weights(module.parameters())
    both = timing.device_times({v: steps(v) for v in variants}, repeats, before=touch, lead=1)
    # A peak after the step before has returned its memory; what others left is not its.
    peaks = {}
    for variant in variants:
        x.grad = weights.grad = None
        memory.drop_gradients(module)
        memory.free()
        peaks[variant] = memory.peak(steps(variant)) / memory.GIB
    x.grad = weights.grad = None
    memory.drop_gradients(module)
    with torch.no_grad():
        exact = moe.exact(module, p, CHECKED_TOKENS)
        noise = {v: timing.sqnr(forward(module, v, p)[:CHECKED_TOKENS], exact) for v in variants}
        ours = next(v for v in variants if v.startswith("fp8"))
        with moe.running(module, ours), fp8.cached_weights(module):
            calls = {v: partial(forward, module, v, p) for v in variants}
            cached = timing.device_times(calls, repeats, lead=1)
    return [
        {
            "model": shape.model,
            "tokens": shape.tokens,
            "routing": "even" if even else "random",
            "variant": variant,
            "step_us": both[variant].as_dict(),
            "forward_us": cached[variant].as_dict(),
            "step_speedup": both[moe.BF16].median / both[variant].median,
            "forward_speedup": cached[moe.BF16].median / cached[variant].median,
            "peak_gib": peaks[variant],
            "peak_ratio": peaks[variant] / peaks[moe.BF16],
            "host_us": None,
            "host_step_us": None,
            "sqnr_db": noise[variant],
        }
        for variant in variants
    ]


def measure_host(options) -> list[Row]:
    shape = moe.SMALL
    module = moe.experts(shape)
    p = moe.problem(shape, even=False)
    x, weights = (t.detach().requires_grad_() for t in (p.x, p.weights))
    variants = [moe.BF16, f"fp8 {options.recipes[0]}"]
    repeats = 10 if options.quick else 30
    with torch.no_grad():
        forwards = timing.host_times({v: partial(forward, module, v, p) for v in variants}, repeats)
    steps = timing.host_times(
        {v: partial(step, module, v, p, x, weights) for v in variants}, repeats
    )
    return [
        {
            "model": shape.model,
            "tokens": shape.tokens,
            "routing": "random",
            "variant": variant,
            "step_us": None,
            "forward_us": None,
            "step_speedup": None,
            "forward_speedup": None,
            "peak_gib": None,
            "peak_ratio": None,
            "host_us": forwards[variant].as_dict(),
            "host_step_us": steps[variant].as_dict(),
            "sqnr_db": None,
        }
        for variant in variants
    ]


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    skipped: Row = {}
    wanted = [(shape, False) for shape in moe.SHAPES]
    try:
        moe.torchao_product()
        wanted.append((moe.SHAPES[-1], True))
    except ImportError as error:
        skipped[moe.TORCHAO] = peers.reason(error)
    rows = measure_host(options)
    for shape, even in tqdm(wanted, unit="shape"):
        rows += measure_shape(shape, even, options, skipped)
        memory.free()
    return rows, skipped


def table(rows: list[Row]) -> str:
    columns = [
        *("model", "tokens", "routing", "variant", "fwd+bwd us", "x bf16"),
        *(
            "fwd, cached us",
            "x bf16",
            "peak GiB",
            "x bf16",
            "host us",
            "host fwd+bwd us",
            "SQNR dB",
        ),
    ]

    def median(row: Row, what: str):
        return row[what]["median"] if row[what] else None

    lines = [
        [
            *(row[what] for what in ("model", "tokens", "routing", "variant")),
            median(row, "step_us"),
            tables.ratio(row["step_speedup"]),
            median(row, "forward_us"),
            tables.ratio(row["forward_speedup"]),
            row["peak_gib"],
            tables.ratio(row["peak_ratio"]),
            median(row, "host_us"),
            median(row, "host_step_us"),
            row["sqnr_db"],
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=4)


def arguments(parser: argparse.ArgumentParser) -> None:
    known = import_fp8().GROUPED_RECIPES
    parser.add_argument("--recipes", nargs="+", choices=known, default=list(known))
    parser.add_argument("--repeats", type=int, help="timed calls per variant")


if __name__ == "__main__":
    sys.exit(main("moe", __doc__.splitlines()[0], measure, table, arguments))
