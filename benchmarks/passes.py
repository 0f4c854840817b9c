"""Passes that no operator makes alone: the kernels between the grouped products of moe_experts, by
their names in a profile of whole steps. Their inputs were written by the kernels before them, so
what fits into L2 may still be there."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import kernel_times
import timing
import torch

HIDDEN, FEATURES, EXPERTS = 4096, 14336, 8  # Mixtral-8x7B's
INPUT_MB = (67, 235, 940)  # of gates and ups, or of rows


# Elements of each.
WEIGHTS = (2 * FEATURES * HIDDEN * EXPERTS, FEATURES * HIDDEN * EXPERTS)


class Pass(NamedTuple):
    op: str
    needles: tuple[str, ...]  # all in the kernels' names
    launches: Callable[[int], tuple[int, ...]]  # elements of each in a step, from the rows; the
    # first is that of the size that is measured
    bytes_per_element: int
    features: int = FEATURES  # of the step that it is taken from
    row_elements: int = 2 * FEATURES  # of what the size is given for


# With top_k = 1 a token has one row. Rows to their experts: in a step of few features, where their
# size is that of the others. Columns: of the gradients and inputs of both products for the weight
# gradients, and of both weights for the input gradients, whose maxima the pass over their rows
# leaves.
PASSES = (
    Pass(
        "rows to their experts",
        ("row_kernel", "ScatterParams"),
        lambda m: 2 * (m * HIDDEN,),
        3,
        features=128,
        row_elements=HIDDEN,
    ),
    Pass("gated rows, forward", ("row_kernel", "ForwardParams"), lambda m: (m * FEATURES,), 5),
    Pass("gated rows, backward", ("gate_backward",), lambda m: (m * FEATURES,), 14),
    Pass("weights, rows and maxima of columns", ("group_rows",), lambda _: WEIGHTS, 3),
    Pass(
        "columns of groups, amax",
        ("group_amax",),
        lambda m: (2 * m * FEATURES, m * FEATURES, m * HIDDEN, m * HIDDEN),
        2,
    ),
    Pass(
        "columns of groups, cast",
        ("group_cast",),
        lambda m: (2 * m * FEATURES, m * FEATURES, m * HIDDEN, m * HIDDEN, *WEIGHTS),
        3,
    ),
)
TWIN = ("row_kernel", "MatrixRows")


def step_of(rows: int, features: int):
    """A training step of experts on `rows` tokens, each with one expert."""

    def normal(*size: int) -> torch.Tensor:
        made = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return (made * size[-1] ** -0.5).requires_grad_()

    gate_up, down = normal(EXPERTS, 2 * features, HIDDEN), normal(EXPERTS, HIDDEN, features)
    x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    index = torch.randint(0, EXPERTS, (rows, 1), device="cuda")
    weights = torch.rand(rows, 1, device="cuda").requires_grad_()
    dy = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    leaves = (x, weights, gate_up, down)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.ops.fp8.moe_experts(x, index, weights, gate_up, down, recipe="rowwise").backward(dy)

    return step


def total_us(kernels: list[kernel_times.Kernel], needles: tuple[str, ...], steps: int) -> float:
    """Of one of `steps` steps. Raises RuntimeError where no kernel has such a name (any more)."""
    found = [k.us for k in kernels if all(needle in k.name for needle in needles)]
    if not found:
        raise RuntimeError(f"no kernel of the step is named {' and '.join(needles)}")
    return sum(found) / steps


def launch_us(
    kernels: list[kernel_times.Kernel], p: Pass, launches: tuple[int, ...], steps: int
) -> float:
    """Of a launch of launches[0] elements, on average over `steps` steps: of the longest, or of
    those that come after as many longer ones as there are larger sizes. Raises RuntimeError where a
    step has another number of launches."""
    found = sorted((k.us for k in kernels if all(n in k.name for n in p.needles)), reverse=True)
    if len(found) != len(launches) * steps:
        raise RuntimeError(f"{p.op}: {len(found)} launches, not {len(launches)} in each step")
    larger = sum(size > launches[0] for size in launches)
    return statistics.fmean(found[larger * steps :][: launches.count(launches[0]) * steps])


@functools.cache
def copy_us(moved: int, repeats: int) -> float:
    """Of a device copy that reads and writes `moved` bytes in all."""
    source = torch.randint(0, 127, (moved // 2,), device="cuda").to(torch.int8)
    target = torch.empty_like(source)
    target.copy_(source)
    copies = kernel_times.profile(lambda: target.copy_(source), repeats)
    return statistics.median(k.us for k in copies)


def step_kernels(rows: int, features: int, repeats: int) -> list[kernel_times.Kernel]:
    step = step_of(rows, features)
    for _ in range(2):
        step()
    found = kernel_times.profile(step, repeats)
    del step
    torch.cuda.empty_cache()
    return found


def result(op: str, rows: int, input_mb: int, us: float, moved: tuple[int, ...], repeats: int):
    """A row of the JSON: a pass whose launches move so many bytes each takes `us` in all."""
    copied = sum(copy_us(size, repeats) for size in moved)
    return {
        "op": op,
        "m": rows,
        "k": FEATURES,
        "input_mb": input_mb,
        "bytes_per_element": "",
        "time_us": timing.summarize([us]).as_dict(),
        "copy_us": timing.summarize([copied]).as_dict(),
        "gb_per_s": sum(moved) / us / 1e3,
        "of_copy": copied / us,
    }


def measure(repeats: int, sizes: tuple[int, ...] = INPUT_MB) -> list[dict]:
    """One row for each pass and size: as bench_quantize's, with the profile's times. Where a pass
    has launches of several sizes in a step, that of the size that is named: of the gradients of
    gates and ups, or of the larger weight. The others are smaller by up to 7 times."""
    found: list[dict] = []
    for input_mb in sizes:
        steps: dict[tuple[int, int], list[kernel_times.Kernel]] = {}
        timed = []
        for p in PASSES:
            rows = round(input_mb * 1e6 / (2 * p.row_elements))
            key = rows, p.features
            if key not in steps:
                steps[key] = step_kernels(*key, repeats)
            launches = p.launches(rows)
            moved = (launches[0] * p.bytes_per_element,)
            timed.append((p.op, rows, launch_us(steps[key], p, launches, repeats), moved))
        rows = round(input_mb * 1e6 / (4 * FEATURES))
        x = torch.randn(rows, 2 * FEATURES, device="cuda", dtype=torch.bfloat16)
        torch.ops.fp8.quantize_rowwise(x)
        dense = kernel_times.profile(lambda x=x: torch.ops.fp8.quantize_rowwise(x), repeats)
        timed.append(("rows of a matrix", rows, total_us(dense, TWIN, repeats), (3 * x.numel(),)))
        del x
        for op, rows, us, moved in timed:
            found.append(result(op, rows, input_mb, us, moved, repeats))
    return found
