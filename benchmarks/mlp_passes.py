"""The passes between the products of ops.mlp, gated with two weights, by their names in a profile
of whole steps, as passes.py has those of experts."""

from __future__ import annotations

import kernel_times
import passes
import torch

import fp8

HIDDEN, FEATURES = 4096, 14336  # Llama-3-8B's

# By recipe: the pass, its kernels, bytes an element of [rows, FEATURES].
PASSES = {
    "tensorwise": (
        ("mlp forward, amax", ("unit_screened_amax_kernel", "UnitSource"), 4),
        ("mlp forward, cast", ("cast_kernel", "UnitSource"), 5),
        ("mlp backward, amax", ("unit_screened_amax_kernel", "BackwardParams"), 6),
        ("mlp backward, cast", ("unit_cast_kernel",), 11),
    ),
    "rowwise": (
        ("mlp rows, forward", ("computed_row_kernel", "UnitRows"), 5),
        ("mlp rows, backward, maxima", ("unit_axis_amax_kernel",), 6),
        ("mlp rows, backward, cast", ("unit_axis_cast_kernel",), 11),
    ),
    "delayed": (
        ("mlp forward, delayed", ("cast_kernel", "UnitSource"), 5),
        ("mlp backward, delayed", ("unit_cast_delayed_kernel",), 11),
    ),
    "blockwise": (
        ("mlp blocks, forward", ("blockwise_kernel", "UnitSource"), 5),
        ("mlp blocks, backward", ("unit_blocks_kernel",), 11),
    ),
}


# The same where gate and up are saved as codes.
PASSES_OF_CODES = {
    "tensorwise": (
        ("mlp codes of gate and up", ("row_kernel",), 6),
        ("mlp backward of codes, amax", ("unit_screened_amax_kernel", "BackwardParams"), 4),
        ("mlp backward of codes, cast", ("unit_cast_kernel",), 9),
    ),
    "rowwise": (
        ("mlp rows, backward of codes, maxima", ("unit_axis_amax_kernel",), 4),
        ("mlp rows, backward of codes, cast", ("unit_axis_cast_kernel",), 9),
    ),
    "delayed": (("mlp backward of codes, delayed", ("unit_cast_delayed_kernel",), 9),),
    "blockwise": (("mlp blocks, backward of codes", ("unit_blocks_kernel",), 9),),
}


def step_of(rows: int, recipe: str, save: str):
    """A training step of one MLP on `rows` tokens."""

    def normal(*size: int) -> torch.Tensor:
        made = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return (made * size[-1] ** -0.5).requires_grad_()

    gate, up = normal(FEATURES, HIDDEN), normal(FEATURES, HIDDEN)
    down = normal(HIDDEN, FEATURES)
    x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    leaves = (x, gate, up, down)
    names = ("gate_history", "up_history", "down_history") if recipe == "delayed" else ()
    histories = {name: fp8.ops.make_history("cuda") for name in names}

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        fp8.ops.mlp(*leaves, recipe=recipe, save=save, **histories).backward(dy)

    return step


def measure(repeats: int, sizes: tuple[int, ...] = passes.INPUT_MB) -> list[dict]:
    """One row for each pass and size, as passes.measure has them."""
    found: list[dict] = []
    for input_mb in sizes:
        rows = round(input_mb * 1e6 / (4 * FEATURES) / 128) * 128  # as batches have
        tables = [("bf16", *of_recipe) for of_recipe in PASSES.items()]
        tables += [("fp8", *of_recipe) for of_recipe in PASSES_OF_CODES.items()]
        for save, recipe, table in tables:
            step = step_of(rows, recipe, save)
            for _ in range(2):
                step()
            kernels = kernel_times.profile(step, repeats)
            del step
            torch.cuda.empty_cache()
            for op, needles, bytes_per_element in table:
                us = passes.total_us(kernels, needles, repeats)
                moved = (rows * FEATURES * bytes_per_element,)
                found.append(passes.result(op, rows, input_mb, us, moved, repeats))
    return found
