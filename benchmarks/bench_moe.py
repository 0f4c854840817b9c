"""Experts of a mixture, routing given, against transformers' grouped_mm in bf16.

moe_experts, or two grouped_linear ("composed"), behind transformers' experts_implementation: a
whole module, forward and backward, with weights that count as new before each step; and a forward
without gradients, ours inside fp8.cached_weights. "GEMMs alone" are the grouped products by
themselves, the ceiling: in bf16, and in FP8 with gradients in split and in fast accumulation.
Host time is that of a step of 16 tokens.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

import memory
import moe_layer
import tables
import timing
import torch
from peers import reason
from runs import Row, main
from shapes import GROUPED_RECIPES, MoeShape, moe_shapes
from torch import nn
from tqdm import tqdm

CEILINGS = {
    "GEMMs alone, bf16": "bf16",
    "GEMMs alone, fp8": "split",
    "GEMMs alone, fp8 fast": "fast",
}
HOST_TOKENS = 16


def noise(module: nn.Module, data: moe_layer.Data, exact: moe_layer.Exact) -> Row:
    """SQNR of a step's results, with the gradients on the module; of two weights the lower one."""
    with torch.no_grad():
        y = module(data.x, data.index, data.weights)[: moe_layer.CHECKED]
    up, down = (parameter.grad[0] for parameter in module.parameters())
    return {
        "sqnr_db": timing.sqnr(y, exact.y),
        "sqnr_dx_db": timing.sqnr(data.x.grad[: moe_layer.CHECKED], exact.dx),
        "sqnr_dw_db": min(timing.sqnr(up, exact.d_up), timing.sqnr(down, exact.d_down)),
    }


def measure_shape(shape: MoeShape, options: argparse.Namespace) -> tuple[list[Row], Row]:
    module = moe_layer.make_experts(shape)
    data = moe_layer.make_data(shape)
    few = data.first(HOST_TOKENS)
    exact = moe_layer.exact(module, data)
    recipes = tuple(options.recipes or GROUPED_RECIPES)
    made, left_out = moe_layer.variants(module, recipes, not options.no_peers)
    forwards, steps, hosts, found = {}, {}, {}, {}
    with ExitStack() as contexts:
        weights = sum(parameter.nbytes for parameter in module.parameters())
        for name, variant in made.items():
            forward, step = moe_layer.calls(variant, data)
            try:
                memory.drop_gradients(variant)
                data.x.grad = data.weights.grad = None
                others = memory.resident() - weights
                row: Row = {"peak_gib": (memory.peak(step) - others) / memory.GIB}
                row |= noise(variant, data, exact)
            except Exception as error:  # a peer that fails is named, not fatal
                if name == "bf16" or name.startswith("fp8"):
                    raise
                left_out.skipped[f"{name} at {shape}"] = reason(error)
                continue
            forwards[name], steps[name], found[name] = forward, step, row
            hosts[name] = moe_layer.calls(variant, few)[1]
        memory.drop_gradients(module)
        for name, kind in CEILINGS.items():
            forwards[name], steps[name] = moe_layer.gemms_alone(shape, module, kind)
        repeats = options.repeats or (5 if options.quick else 11)
        touch = timing.new_weights(module.parameters())
        both = timing.device_times(steps, repeats, warmup=1, before=touch, lead=1)
        host = timing.host_times(hosts, repeats=5, calls=4, warmup=2, before=touch)
        for name in found:
            contexts.enter_context(moe_layer.cached(made[name], name))
        fwd = timing.device_times(forwards, repeats, warmup=1, lead=1)
    base = {name: times["bf16"].median for name, times in (("fwd", fwd), ("both", both))}
    rows = [
        {
            **shape._asdict(),
            "variant": name,
            "forward_us": fwd[name].as_dict(),
            "step_us": both[name].as_dict(),
            "forward_speedup": base["fwd"] / fwd[name].median,
            "step_speedup": base["both"] / both[name].median,
            "host_us": host[name].as_dict() if name in host else None,
            "host_ratio": host[name].median / host["bf16"].median if name in host else None,
            **(
                found.get(name)
                or dict.fromkeys(("peak_gib", "sqnr_db", "sqnr_dx_db", "sqnr_dw_db"))
            ),
            "peak_ratio": found[name]["peak_gib"] / found["bf16"]["peak_gib"]
            if name in found
            else None,
        }
        for name in steps
    ]
    return rows, left_out.skipped


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    rows: list[Row] = []
    skipped: Row = {}
    for shape in tqdm(moe_shapes(options.quick), unit="shape"):
        try:
            more, left_out = measure_shape(shape, options)
        except (ImportError, torch.cuda.OutOfMemoryError) as error:
            more, left_out = [], {str(shape): reason(error)}
        rows += more
        skipped |= left_out
        memory.free()
    return rows, skipped


def table(rows: list[Row]) -> str:
    columns = [
        *("shape", "variant", *tables.STEP_COLUMNS),
        *("host us", "peak GiB", "x bf16", "SQNR y", "dx", "dW"),
    ]
    lines = [
        [
            f"{row['model']}, {row['tokens']}",
            row["variant"],
            *tables.step_cells(row),
            row["host_us"] and row["host_us"]["median"],
            row["peak_gib"],
            tables.ratio(row["peak_ratio"]),
            *(row[f"sqnr{what}_db"] for what in ("", "_dx", "_dw")),
        ]
        for row in rows
    ]
    return tables.text(columns, lines, left=2)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipes", nargs="+", choices=GROUPED_RECIPES, help="default: all")
    parser.add_argument("--repeats", type=int, help="timed calls per variant")
    parser.add_argument("--no-peers", action="store_true", help="transformers and fp8 only")


if __name__ == "__main__":
    sys.exit(main("moe", __doc__.splitlines()[0], measure, table, arguments))
