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
DENSE_WEIGHTS = (2 * FEATURES * HIDDEN, 2 * FEATURES * HIDDEN)


class Pass(NamedTuple):
    op: str
    needles: tuple[str, ...]  # all in the kernels' names
    launches: Callable[[int], tuple[int, ...]]  # elements of each in a step, from the rows; the
    # first is that of the size that is measured
    bytes_per_element: int
    features: int = FEATURES  # of the step that it is taken from
    row_elements: int = 2 * FEATURES  # of what the size is given for
    then: str = ""  # in the name of a second kernel, with whose end the pass ends


# With top_k = 1 a token has one row. Rows to their experts: in a step of few features, where their
# size is that of the others. Columns: of the gradients and inputs of both products for the weight
# gradients; those of the weights for the input gradients have their maxima from the pass over rows.
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
        "columns of groups",
        ("group_amax",),
        lambda m: (2 * m * FEATURES, m * FEATURES, m * HIDDEN, m * HIDDEN),
        5,
        then="group_cast",
    ),
)
# What they are held against: passes over a matrix, between the products of two dense linears. Rows:
# where no gradient is asked for. Both: of the first one's output, forward and backward.
ROWS = Pass(
    "rows of a matrix",
    ("row_kernel", "MatrixRows"),
    lambda m: (2 * m * FEATURES, m * HIDDEN, *DENSE_WEIGHTS),
    3,
)
BOTH = Pass(
    "rows and columns of a matrix",
    ("statistics_kernel",),
    lambda m: (2 * m * FEATURES, 2 * m * FEATURES, *DENSE_WEIGHTS),
    6,
    then="cast_kernel",
)


def normal(*size: int) -> torch.Tensor:
    made = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    return (made * size[-1] ** -0.5).requires_grad_()


def step_of(rows: int, features: int):
    """A training step of experts on `rows` tokens, each with one expert."""
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


def dense_step(rows: int, training: bool):
    """Two linears, one after the other, with [rows, 2 * FEATURES] in between."""
    linear = torch.ops.fp8.fused_linear
    first, second = normal(2 * FEATURES, HIDDEN), normal(HIDDEN, 2 * FEATURES)
    x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        for leaf in (x, first, second):
            leaf.grad = None
        with torch.set_grad_enabled(training):
            y = linear(linear(x, first, None, "rowwise"), second, None, "rowwise")
        if training:
            y.backward(dy)

    return step


def total_us(kernels: list[kernel_times.Kernel], needles: tuple[str, ...], steps: int) -> float:
    """Of one of `steps` steps. Raises RuntimeError where no kernel has such a name (any more)."""
    found = [k.us for k in kernels if all(needle in k.name for needle in needles)]
    if not found:
        raise RuntimeError(f"no kernel of the step is named {' and '.join(needles)}")
    return sum(found) / steps


def durations(kernels: list[kernel_times.Kernel], p: Pass) -> list[float]:
    """us of each of the pass, the longest first. Two launches of one pass overlap, so that their
    times do not add up: from the first one's start to the second one's end."""
    found = []
    for i, kernel in enumerate(kernels):
        if not all(needle in kernel.name for needle in p.needles):
            continue
        if p.then:
            second = next((k for k in kernels[i + 1 : i + 3] if p.then in k.name), None)
            if second is None:
                continue
            found.append(second.end - kernel.start)
        else:
            found.append(kernel.us)
    return sorted(found, reverse=True)


def launch_us(
    kernels: list[kernel_times.Kernel], p: Pass, launches: tuple[int, ...], steps: int
) -> float:
    """Of a launch of launches[0] elements, on average over `steps` steps: of the longest, or of
    those that come after as many longer ones as there are larger sizes. Raises RuntimeError where a
    step has fewer launches."""
    found = durations(kernels, p)
    if len(found) < len(launches) * steps:
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


def profiled(step: Callable[[], None], repeats: int) -> list[kernel_times.Kernel]:
    for _ in range(2):
        step()
    found = kernel_times.profile(step, repeats)
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
        rows = round(input_mb * 1e6 / (4 * FEATURES))
        dense = [
            (p, rows, profiled(dense_step(rows, training), repeats))
            for p, training in ((ROWS, False), (BOTH, True))
        ]
        of_experts = []
        for p in PASSES:
            key = round(input_mb * 1e6 / (2 * p.row_elements)), p.features
            if key not in steps:
                steps[key] = profiled(step_of(*key), repeats)
            of_experts.append((p, key[0], steps[key]))
        for p, m, kernels in of_experts + dense:
            launches = p.launches(m)
            moved = (launches[0] * p.bytes_per_element,)
            us = launch_us(kernels, p, launches, repeats)
            found.append(result(p.op, m, input_mb, us, moved, repeats))
    return found
