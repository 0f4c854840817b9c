"""Training steps of transformers' models: Llama, Qwen3, Qwen3-MoE and Mixtral, a few layers each.

What a user gets: forward with loss, backward, fused AdamW, zero_grad; and one decoder layer alone,
forward + backward. bf16 in eager mode, compiled and with Liger's kernels, fp8.convert with each of
these, and the peers that can be imported. Each variant has the GPU for itself, on a model built
anew with the same weights; bf16 is first, and last again: the difference is the run's drift. What
needs Liger, which patches transformers, runs in a process of its own that measures bf16 too: its
ratios are to that.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import groupby

import kernel_times
import liger_process
import memory
import model_variants
import models
import peers
import tables
import timing
import torch
from liger_process import LATE
from model_cases import GROUPS, ModelCase, case_name, model_cases
from model_variants import BESIDE, LAST, VARIANTS
from runs import Row, main
from tqdm import tqdm

WARMUP = 3  # steps
PROFILED = ("bf16", "fp8 tensorwise", "fp8 delayed")


def settled(case: ModelCase, peer: peers.Peer) -> tuple[models.Calls, float | None]:
    """The variant's steps, warmed up, and the loss after WARMUP of them: all variants begin with
    the same weights. Raises ValueError for one that is not finite."""
    model = peer.make(models.build(case))
    calls = models.calls(model, case, peer.context)
    losses = [calls.step() for _ in range(max(WARMUP, peer.settle))]
    loss = losses[WARMUP - 1]
    if loss is None:
        return calls, None
    if not math.isfinite(float(loss)):
        raise ValueError(f"the loss is {float(loss)}")
    return calls, float(loss)


def measure_variant(case: ModelCase, peer: peers.Peer, options: argparse.Namespace) -> Row:
    others = memory.resident()
    begin = time.perf_counter()
    calls, loss = settled(case, peer)
    torch.cuda.synchronize()
    setup = time.perf_counter() - begin
    peak = memory.peak(calls.step) - others
    repeats = options.repeats or (4 if options.quick else 8)
    step = timing.in_a_row(calls.step, repeats)
    part = calls.without_optimizer and timing.in_a_row(calls.without_optimizer, repeats)
    host = None
    if not case.mixture:  # whose kernels are more than the launch queue holds
        host = timing.host_times({"": calls.step}, repeats=3, calls=1, warmup=0)[""].median / 1e3
    return {
        **case.row(),
        "variant": peer.name,
        "step_us": step.as_dict(),
        "without_optimizer_us": part and part.as_dict(),
        "host_ms": host,
        "peak_gib": peak / memory.GIB,
        "loss": loss,
        "setup_s": round(setup, 1),
        "profile": None,
    }


def in_turn(case: ModelCase, peer: peers.Peer):
    """Where Liger's kernels are in place if the variant needs them."""
    return model_variants.patched(case) if model_variants.needs_liger(peer.name) else nullcontext()


def names_of(case: ModelCase, options: argparse.Namespace) -> list[str]:
    """The case's variants in this process, bf16 first."""
    wanted = options.variants or case.variants
    if "all" in wanted:
        wanted = VARIANTS
    mine = [name for name in wanted if model_variants.needs_liger(name) == options.liger]
    return ["bf16", *(name for name in mine if name != "bf16")]


def measure_case(
    case: ModelCase, options: argparse.Namespace, deadline: float, skipped: Row
) -> list[Row]:
    if time.monotonic() > deadline:
        skipped[str(case)] = LATE
        return []
    names = names_of(case, options)
    found = peers.gather(*((name, VARIANTS[name]) for name in names))
    skipped |= found.skipped
    if not options.liger:
        found.found.append(peers.Peer(LAST, lambda model: model))
    rows: list[Row] = []
    for peer in tqdm(found.found, unit="variant", desc=str(case), leave=False):
        name = f"{peer.name} at {case}"
        if time.monotonic() > deadline and peer.name not in ("bf16", LAST):
            skipped[name] = LATE
            continue
        try:
            with in_turn(case, peer):
                row = measure_variant(case, peer, options)
        except Exception as error:  # a peer that fails is named, not fatal
            if model_variants.must_work(peer.name):
                raise
            skipped[name] = peers.reason(error)
            continue
        finally:
            memory.free()
        model_variants.add_compared(rows, row)
    return rows


def with_liger(
    cases: list[ModelCase], options: argparse.Namespace, deadline: float, skipped: Row
) -> list[Row]:
    """The rows of cases of one group that need Liger, from a process of their own."""
    child = argparse.Namespace(**vars(options) | {"liger": True})
    names = {name for case in cases for name in names_of(case, child)[1:]}
    left = deadline - time.monotonic()
    if not names:
        return []
    if find_spec("liger_kernel") is None or left <= 0:
        why = LATE if left <= 0 else "No module named 'liger_kernel'"
        skipped |= {name: why for name in VARIANTS if name in names}
        return []
    rows, left_out = liger_process.rows_of(cases[0].group, options, left)
    skipped |= left_out
    for row in rows:
        row["variant"] = BESIDE if row["variant"] == "bf16" else row["variant"]
    return rows


def add_profiles(
    rows: list[Row], cases: list[ModelCase], options: argparse.Namespace, deadline: float
) -> Row:
    """Puts the kernels by kind into rows of variants that are to be profiled; returns what was
    left out. After all times: launches may stay slower once CUPTI is on."""
    skipped: Row = {}
    chosen = options.profile or PROFILED
    measured = {(case_name(row), row["variant"]): row for row in rows}
    todo = [
        (case, name)
        for case in cases
        for name in names_of(case, options)
        if name in chosen and not (options.liger and name == "bf16")
    ]
    if todo:  # the profile that starts CUPTI may lose what runs meanwhile
        kernel_times.profile(torch.zeros(1 << 20, device="cuda").zero_, 2)
    for case, name in tqdm(todo, unit="variant", desc="profile", leave=False):
        for peer in peers.gather((name, VARIANTS[name])).found:
            row = measured.get((str(case), peer.name))
            if row is None:
                continue
            if time.monotonic() > deadline:
                skipped[f"profile of {peer.name} at {case}"] = LATE
                continue
            try:
                with in_turn(case, peer):
                    row["profile"] = profile(settled(case, peer)[0].step)
            except RuntimeError as error:  # the times are worth having without
                skipped[f"profile of {peer.name} at {case}"] = peers.reason(error)
            finally:
                memory.free()
    return skipped


def profile(step, steps: int = 2) -> Row:
    """us of a step's kernels of each kind, their number, and the share of rest."""
    kernels = kernel_times.profile(step, steps)
    found: Row = kernel_times.per_step(kernels, steps, kernel_times.KINDS, kernel_times.kind)
    busy = sum(found[f"{kind}_us"] for kind in kernel_times.KINDS)
    return found | {"rest_share": found["rest_us"] / busy}


def measure(options: argparse.Namespace) -> tuple[list[Row], Row]:
    if find_spec("transformers") is None:
        return [], {"every model": "No module named 'transformers'"}
    deadline = time.monotonic() + options.time_limit
    rows: list[Row] = []
    skipped: Row = {}
    cases = [
        case
        for case in model_cases(options.quick)
        if not options.models or case.group in options.models
    ]
    if options.liger:  # of the others the main process has bf16
        cases = [case for case in cases if len(names_of(case, options)) > 1]
    with tqdm(total=len(cases), unit="case") as bar:
        for _, group in groupby(cases, key=lambda case: case.group):
            together = list(group)
            for case in together:
                rows += measure_case(case, options, deadline, skipped)
                options.save(rows, skipped)
                bar.update()
            if not options.liger:
                rows += with_liger(together, options, deadline, skipped)
                options.save(rows, skipped)
    if options.profile is not None and rows:
        skipped |= add_profiles(rows, cases, options, deadline)
    order = [str(case) for case in cases]
    rows.sort(key=lambda row: order.index(case_name(row)))
    return rows, skipped


def table(rows: list[Row]) -> str:
    columns = [
        *("case", "variant", "step ms", "x bf16", "spread", "no opt. ms", "host ms"),
        *("peak GiB", "x bf16", "loss", "setup s"),
    ]
    profiled = any(row["profile"] for row in rows)
    columns += ["rest", "kernels"] if profiled else []
    lines = []
    for row in rows:
        part, found = row["without_optimizer_us"], row["profile"]
        more = [f"{100 * found['rest_share']:.0f}%", found["kernels"]] if found else [None] * 2
        lines.append(
            [
                case_name(row),
                row["variant"],
                row["step_us"]["median"] / 1e3,
                tables.ratio(row["speedup"]),
                tables.spread(row["step_us"]),
                part and part["median"] / 1e3,
                row["host_ms"],
                row["peak_gib"],
                tables.ratio(row["peak_ratio"]),
                row["loss"],
                row["setup_s"],
                *(more if profiled else []),
            ]
        )
    return tables.text(columns, lines, left=2)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=GROUPS, help="default: all")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=("all", *VARIANTS),
        metavar="NAME",
        help=f"beside bf16, in place of each case's own: all, or of {', '.join(VARIANTS)}",
    )
    parser.add_argument("--repeats", type=int, help="timed steps per variant")
    parser.add_argument(
        "--profile",
        nargs="*",
        choices=tuple(VARIANTS),
        metavar="NAME",
        help=f"kernels by kind, of these variants (default {', '.join(PROFILED)})",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=300,
        metavar="S",
        help="seconds after which nothing more is begun (default %(default)s)",
    )
    parser.add_argument("--liger", action="store_true", help=argparse.SUPPRESS)  # the own process


if __name__ == "__main__":
    sys.exit(main("model", __doc__.splitlines()[0], measure, table, arguments))
