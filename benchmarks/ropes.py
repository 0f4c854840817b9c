"""Rotary position embedding by profile, forward and backward apart, against a device copy of as
many bytes: q and k of one pass, which are larger than L2 together."""

from __future__ import annotations

from collections.abc import Callable

import against_copy
import kernel_times
import passes
import torch

SHAPES = (
    # tokens, heads of q, of k, their size
    (8192, 32, 8, 128),  # Llama 3 8B
    (8192, 64, 8, 128),  # Llama 3 70B
    (16384, 32, 4, 128),
    (32768, 14, 2, 64),
)
KERNEL = "rope_kernel"  # of both directions
BYTES = 4  # an element, of 16 bits: read and written


Call = Callable[[], object]


def calls(tokens: int, q_heads: int, k_heads: int, size: int) -> dict[str, tuple[Call, Call]]:
    """Forward, and forward with backward, of q and k as they come from projections of their own,
    and from a merged one."""
    heads = (q_heads, k_heads)
    angles = torch.randn(2, 1, 1, tokens, size, device="cuda", dtype=torch.bfloat16)
    ops, grad = torch.ops.fp8, torch.autograd.grad

    def rows(count: int) -> torch.Tensor:
        return torch.randn(1, tokens, count * size, device="cuda", dtype=torch.bfloat16)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, size)).transpose(1, 2).detach().requires_grad_()

    grads = [split(rows(count)).detach() for count in heads]
    apart = [split(rows(count)) for count in heads]
    merged = rows(q_heads + 2 * k_heads)
    joint = [
        merged[..., : q_heads * size],
        merged[..., q_heads * size : (q_heads + k_heads) * size],
    ]
    slices = [split(x) for x in joint]

    def steps(x: list[torch.Tensor], layout: str) -> tuple[Call, Call]:
        def forward() -> list[torch.Tensor]:
            return ops.rope(*x, *angles, layout=layout)

        return forward, lambda: grad(forward(), x, grads)

    return {
        "rope": steps(apart, "halves"),
        "rope of a merged projection": steps(slices, "halves"),
        "rope, interleaved": steps(apart, "interleaved"),
    }


def measure(repeats: int, shapes: tuple[tuple[int, int, int, int], ...] = SHAPES) -> list[dict]:
    """One row for each call, direction and shape: as bench_quantize's, with the profile's times."""
    found: list[dict] = []
    for tokens, q_heads, k_heads, size in shapes:
        columns = (q_heads + k_heads) * size
        variants = [*calls(tokens, q_heads, k_heads, size).items()]
        first = (tokens, q_heads, k_heads, size) == SHAPES[0]
        for op, (forward, both) in variants if first else variants[:1]:
            times = []
            for step in (forward, both):
                for _ in range(3):
                    step()
                kernels = kernel_times.profile(step, repeats)
                times.append(passes.total_us(kernels, (KERNEL,), repeats))
            for what, us in (("forward", times[0]), ("backward", times[1] - times[0])):
                name = f"{op}, {what}, {q_heads} + {k_heads} heads of {size}"
                found.append(against_copy.result(name, tokens, columns, BYTES, us, repeats))
        torch.cuda.empty_cache()
    return found


def main() -> None:
    """`python benchmarks/ropes.py`: the rows by themselves."""
    against_copy.show(measure(10), width=55)


if __name__ == "__main__":
    from runs import import_fp8

    import_fp8()
    main()
