"""Norms by profile, forward and backward apart: rms_norm, add_rms_norm and layer_norm, against a
device copy of as many bytes. Their inputs are larger than L2 together."""

from __future__ import annotations

import math
from collections.abc import Callable

import against_copy
import kernel_times
import passes
import torch

SHAPES = ((4096, 8192), (8192, 4096), (8192, 8192), (8192, 16384), (262_144, 128), (32_768, 2880))
FORWARD = ("norm_forward",)
BACKWARD = ("norm_backward", "norm_finish")


def calls(rows: int, cols: int) -> dict[str, tuple[Callable[[], object], int, int]]:
    """Steps, and the bytes an element of 16 bits that their forward and backward move."""
    made = [
        torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(2)
    ]
    x, residual = made
    weight, bias = (
        torch.randn(cols, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)
    )
    # Two, as in a model: one tensor read twice comes from L2 the second time.
    dy, dsum = (torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ops, grad = torch.ops.fp8, torch.autograd.grad
    form = "round_then_scale"

    def added() -> object:
        outputs = ops.add_rms_norm(x, residual, weight, 1e-6, form)
        return grad(outputs, [x, residual, weight], [dy, dsum])

    return {
        "rms_norm": (lambda: grad(ops.rms_norm(x, weight, 1e-6, form), [x, weight], dy), 4, 6),
        "rms_norm, (1 + w)": (
            lambda: grad(ops.rms_norm(x, weight, 1e-6, "scale_by_one_plus"), [x, weight], dy),
            4,
            6,
        ),
        "add_rms_norm": (added, 8, 8),
        "layer_norm": (lambda: grad(ops.layer_norm(x, weight, bias), [x, weight, bias], dy), 4, 6),
    }


def measure(repeats: int, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[dict]:
    """One row for each norm, direction and shape: as bench_quantize's, with the profile's times."""
    found: list[dict] = []
    for rows, cols in shapes:
        for op, (step, forward_bytes, backward_bytes) in calls(rows, cols).items():
            for _ in range(3):
                step()
            kernels = kernel_times.profile(step, repeats)
            for what, needles, per_element in (
                ("forward", FORWARD, forward_bytes),
                ("backward", BACKWARD, backward_bytes),
            ):
                us = math.fsum(passes.total_us(kernels, (needle,), repeats) for needle in needles)
                name = f"{op}, {what}, {cols} columns"
                found.append(against_copy.result(name, rows, cols, per_element, us, repeats))
            torch.cuda.empty_cache()
    return found


def main() -> None:
    """`python benchmarks/norms.py`: the rows by themselves."""
    against_copy.show(measure(10), width=45)


if __name__ == "__main__":
    from runs import import_fp8

    import_fp8()
    main()
