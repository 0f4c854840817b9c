"""Passes that no operator makes alone: the kernels between the grouped products of moe_experts, by
their names in a profile of whole steps. Their inputs were written by the kernels before them, so
what fits into L2 may still be there."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import kernel_times
import timing
import torch

HIDDEN, FEATURES, EXPERTS = 4096, 14336, 8  # Mixtral-8x7B's
INPUT_MB = (67, 235, 940)  # of gates and ups


WEIGHTS = 3 * FEATURES * HIDDEN * EXPERTS  # elements


class Pass(NamedTuple):
    op: str
    needles: tuple[str, ...]  # all in the kernels' names
    elements: Callable[[int], int]  # of all its launches in a step, from the rows
    bytes_per_element: int


# With top_k = 1 a token has one row. Columns: of the gradients and inputs of both products for the
# weight gradients, and of both weights for the input gradients, whose maxima the pass over their
# rows leaves.
PASSES = (
    Pass("rows to their experts", ("row_kernel", "ScatterParams"), lambda m: 2 * m * HIDDEN, 3),
    Pass("gated rows, forward", ("row_kernel", "ForwardParams"), lambda m: m * FEATURES, 5),
    Pass("gated rows, backward", ("gate_backward",), lambda m: m * FEATURES, 14),
    Pass("weights, rows and maxima of columns", ("group_rows",), lambda _: WEIGHTS, 3),
    Pass("columns of groups, amax", ("group_amax",), lambda m: m * (3 * FEATURES + 2 * HIDDEN), 2),
    Pass(
        "columns of groups, cast",
        ("group_cast",),
        lambda m: m * (3 * FEATURES + 2 * HIDDEN) + WEIGHTS,
        3,
    ),
)
TWIN = ("row_kernel", "MatrixRows")


def step_of(rows: int):
    """A training step of experts on `rows` tokens, each with one expert."""

    def normal(*size: int) -> torch.Tensor:
        made = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return (made * size[-1] ** -0.5).requires_grad_()

    gate_up, down = normal(EXPERTS, 2 * FEATURES, HIDDEN), normal(EXPERTS, HIDDEN, FEATURES)
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


def copy_us(moved: int, repeats: int) -> float:
    """Of a device copy that reads and writes `moved` bytes in all."""
    source = torch.randint(0, 127, (moved // 2,), device="cuda").to(torch.int8)
    target = torch.empty_like(source)
    target.copy_(source)
    copies = kernel_times.profile(lambda: target.copy_(source), repeats)
    return statistics.median(k.us for k in copies)


def measure(repeats: int, sizes: tuple[int, ...] = INPUT_MB) -> list[dict]:
    """One row for each pass and size: as bench_quantize's, with the profile's times."""
    found: list[dict] = []
    for input_mb in sizes:
        rows = round(input_mb * 1e6 / (4 * FEATURES))
        step = step_of(rows)
        for _ in range(2):
            step()
        kernels = kernel_times.profile(step, repeats)
        del step
        torch.cuda.empty_cache()
        x = torch.randn(rows, 2 * FEATURES, device="cuda", dtype=torch.bfloat16)
        torch.ops.fp8.quantize_rowwise(x)
        dense = kernel_times.profile(lambda x=x: torch.ops.fp8.quantize_rowwise(x), repeats)
        timed = [
            (p.op, total_us(kernels, p.needles, repeats), p.elements(rows) * p.bytes_per_element)
            for p in PASSES
        ]
        timed.append(("rows of a matrix", total_us(dense, TWIN, repeats), 3 * x.numel()))
        del x
        for op, us, moved in timed:
            copied = copy_us(moved, repeats)
            found.append(
                {
                    "op": op,
                    "m": rows,
                    "k": FEATURES,
                    "input_mb": input_mb,
                    "bytes_per_element": "",
                    "time_us": timing.summarize([us]).as_dict(),
                    "copy_us": timing.summarize([copied]).as_dict(),
                    "gb_per_s": moved / us / 1e3,
                    "of_copy": copied / us,
                }
            )
    return found
