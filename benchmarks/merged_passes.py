"""The quantizations of ops.merged_linear, which read several tensors, by their names in a profile
of whole steps, as passes.py has those of experts: weights one below the other, gradients side by
side."""

from __future__ import annotations

import kernel_times
import passes
import torch

import fp8

HIDDEN, ROWS = 4096, (4096, 1024, 1024)  # Llama-3-8B's q, k and v

# By recipe: the pass, its kernels, bytes an element, launches in a step.
_WEIGHTS, _GRADIENTS = "StackedSource", "SideBySideSource"
PASSES = {
    "tensorwise": (
        ("merged weights, amax", ("statistics_kernel", _WEIGHTS), 2, 1),
        ("merged weights, casts", ("cast_kernel", _WEIGHTS), 3, 2),
        ("merged gradients, amax", ("statistics_kernel", _GRADIENTS), 2, 1),
        ("merged gradients, cast", ("cast_kernel", _GRADIENTS), 4, 1),
    ),
    "delayed": (
        ("merged weights, delayed", ("cast_kernel", _WEIGHTS), 3, 2),
        ("merged gradients, delayed", ("cast_kernel", _GRADIENTS), 4, 1),
    ),
}


def step_of(rows: int, recipe: str):
    """A training step of one group of layers on `rows` tokens."""

    def normal(*size: int) -> torch.Tensor:
        made = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return (made * size[-1] ** -0.5).requires_grad_()

    weights = [normal(n, HIDDEN) for n in ROWS]
    x = normal(rows, HIDDEN)
    dys = [torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in ROWS]
    history = {"history": fp8.ops.make_history("cuda")} if recipe == "delayed" else {}

    def step() -> None:
        for leaf in (x, *weights):
            leaf.grad = None
        torch.autograd.backward(fp8.ops.merged_linear(x, weights, None, recipe, **history), dys)

    return step


def measure(repeats: int, sizes: tuple[int, ...] = passes.INPUT_MB) -> list[dict]:
    """One row for each pass and size, which is that of the gradients, as passes.measure has
    them."""
    found: list[dict] = []
    for input_mb in sizes:
        rows = round(input_mb * 1e6 / (2 * sum(ROWS)))
        for recipe, table in PASSES.items():
            step = step_of(rows, recipe)
            for _ in range(2):
                step()
            kernels = kernel_times.profile(step, repeats)
            del step
            torch.cuda.empty_cache()
            for op, needles, bytes_per_element, launches in table:
                us = passes.total_us(kernels, needles, repeats)
                elements = (HIDDEN if _WEIGHTS in needles else rows) * sum(ROWS)
                moved = (elements * bytes_per_element,) * launches
                found.append(passes.result(op, rows, input_mb, us, moved, repeats))
    return found
