"""Norms by profile, forward and backward apart: rms_norm, add_rms_norm and layer_norm, against a
device copy of as many bytes. Their inputs are larger than L2 together.

And rms_norm before a layer of recipe `tensorwise`, with the quantization of what it wrote: with the
amax that the norm leaves for it, and with its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import against_copy
import kernel_times
import passes
import torch
from runs import Row, import_fp8

SHAPES = ((4096, 8192), (8192, 4096), (8192, 8192), (8192, 16384), (262_144, 128), (32_768, 2880))
FORWARD = ("norm_forward",)
BACKWARD = ("norm_backward", "norm_finish")
QUANTIZE = ("cast_kernel", "statistics_kernel", "cooperative")


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


def followed(rows: int, cols: int, repeats: int) -> list[Row]:
    """A norm and a layer whose weight is quantized already."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(rows, cols, **options).requires_grad_()
    weight = torch.randn(cols, **options).requires_grad_()
    layer = import_fp8().Linear(cols, 16, bias=False, **options)
    found = []
    # A view is another tensor than the one that the norm wrote.
    for what, per_element, read in (
        ("its amax", 4, lambda y: y),
        ("no amax", 6, lambda y: y.view_as(y)),
    ):

        def step(read: Callable[[torch.Tensor], torch.Tensor] = read) -> torch.Tensor:
            return layer(read(torch.ops.fp8.rms_norm(x, weight, 1e-6, "round_then_scale")))

        with import_fp8().cached_weights(layer):
            for _ in range(16):  # as many as a norm takes to notice that nobody asks
                step()
            kernels = kernel_times.profile(step, repeats)
        for op, needles, moved in (
            (f"rms_norm that leaves {what}, forward", FORWARD, 4),
            (f"quantization after it, {what} left", QUANTIZE, per_element),
        ):
            us = math.fsum(k.us for k in kernels if any(n in k.name for n in needles)) / repeats
            name = f"{op}, {cols} columns"
            found.append(against_copy.result(name, rows, cols, moved, us, repeats))
    return found


def measure(repeats: int, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[Row]:
    """One row for each norm, direction and shape: as bench_quantize's, with the profile's times."""
    found: list[Row] = []
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
        if cols >= 1024:
            found += followed(rows, cols, repeats)
    return found


def main() -> None:
    """`python benchmarks/norms.py`: the rows by themselves."""
    against_copy.show(measure(10), width=55)


if __name__ == "__main__":
    import_fp8()
    main()
