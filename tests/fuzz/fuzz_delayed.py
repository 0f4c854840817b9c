"""Delayed scaling over many calls whose magnitudes jump, by bounds alone.

What is promised: each operand is cast with a scale of an amax A of a window, or with the call's own
amax a, where A is not between a and 64 a (1024 a in e5m2, whose range reaches lower). So nothing
saturates and nothing vanishes: an element's error is at most that of a cast with so many times the
tensor's own scale. Elements that are not finite
become NaN, and make no scale. The first 16 calls take their own amax. So does dy with a bias
gradient, as in `tensorwise`: there such elements make the whole tensor NaN.
"""

from __future__ import annotations

import math

import bounds
import error_bounds
import torch
from case_fields import Case, Choice, Extent, Family, Listed, Seed
from case_tensors import DTYPES, LAYOUTS, tensor
from error_bounds import Approx, Operand, product, rounded
from fuzz_matmul import with_bias
from reference import E4M3, E5M2
from torch import Tensor

import fp8

FACTOR = {E4M3: 64.0, E5M2: 1024.0}
STEADY = 16  # calls, before which scales are dynamic


def _scaled(x: Tensor, exponent: int | str) -> Tensor:
    """x times a power of ten, in its dtype; "nan" and "inf" put one such element in."""
    if exponent == "zeros":
        return torch.zeros_like(x)
    if isinstance(exponent, int):
        return (x.float() * 10.0**exponent).to(x.dtype)
    x = x.contiguous().clone()
    x.view(-1)[x.numel() // 2] = float(exponent)
    return x


def _operand(
    t: Tensor, dtype: torch.dtype, two: bool, records: int, tensorwise: bool = False
) -> Operand:
    """records: at most, before this call."""
    if tensorwise and not t.isfinite().all():
        t = torch.full_like(t, math.nan)
    own = tensorwise or records < STEADY
    return error_bounds.delayed(t, 1.0 if own else FACTOR[dtype], dtype, two)


def _turned(a: Operand) -> Operand:
    scale = a.scale[:1] if a.scale.numel() else torch.ones(1, 1).double()
    columns = a.value.shape[1]
    return Operand(a.value.t(), a.error.t(), scale.expand(columns, 1), a.largest_code)


def _expected(
    case: Case, layer: fp8.Linear, x: Tensor, dy: Tensor, calls: int, backwards: int
) -> dict[str, Approx]:
    """calls, backwards: those before."""
    two = bool(case["option"])
    qx, qw = (_operand(t.detach(), E4M3, two, calls) for t in (x, layer.weight))
    qdy = _operand(dy, E5M2, two, backwards, tensorwise=layer.bias is not None)
    fast, split = (bounds.accumulation_of(x.device.type, fast) for fast in (True, False))
    y = rounded(product(qx, qw, fast), x.dtype)
    return {
        "y": with_bias(y, layer.bias, x.dtype),
        "dx": rounded(product(qdy, _turned(qw), split), x.dtype),
        "dw": rounded(product(_turned(qdy), _turned(qx), split), x.dtype),
    }


def check_delayed(case: Case, device: str) -> None:
    dtype, k, n = DTYPES[case["dtype"]], case["k"], case["n"]
    recipe = f"delayed{case['option']}"
    layer = fp8.Linear(k, n, case["bias"], device, dtype, recipe=recipe)
    with torch.no_grad():
        weight = tensor("normal", "contiguous", (n, k), dtype, case["data"], device)
        layer.weight.copy_(weight)
    calls = [[0, 0, 0]] * STEADY + case["jumps"] if case["steady"] else case["jumps"]
    backwards = 0
    for number, (of_x, of_weight, of_dy) in enumerate(calls):
        with torch.no_grad():
            layer.weight.copy_(_scaled(weight, of_weight))
        x, dy = (
            tensor("normal", layout, shape, dtype, case["data"] + number, device)
            for layout, shape in ((case["layout"], (case["m"], k)), ("contiguous", (case["m"], n)))
        )
        x, dy = _scaled(x, of_x), _scaled(dy, of_dy)
        x.requires_grad_()
        y = layer(x)
        expected = _expected(case, layer, x, dy, number, backwards)
        error_bounds.check(y.detach(), expected["y"], f"fused_linear y, {recipe}")
        if number % 3 == 2 and case["evaluates"]:
            continue
        backwards += 1
        dx, dw, *_ = torch.autograd.grad(y, (x, *layer.parameters()), dy)  # db: for its sums
        error_bounds.check(dx, expected["dx"], f"fused_linear dx, {recipe}")
        error_bounds.check(dw, expected["dw"], f"fused_linear dw, {recipe}")


class _Jump:
    """Exponents of ten of x, the weight and dy in one call."""

    one = Choice(0, -6, 3, -2, 1, -30, 8, "zeros", "nan", "inf", plain=0.5)

    def draw(self, rng):
        return [self.one.draw(rng), Choice(0, -3, 2, plain=0.7).draw(rng), self.one.draw(rng)]

    def simpler(self, value):
        for i, part in enumerate(value):
            if part != 0:
                yield [*value[:i], 0, *value[i + 1 :]]


DELAYED = Family(
    "delayed",
    {
        "steady": Choice(True, False),
        "jumps": Listed(_Jump(), 1, 24),
        "m": Extent(1, 40),
        "k": Extent(1, 80),
        "n": Extent(1, 80),
        "dtype": Choice("bfloat16", "float32"),
        "option": Choice("", ":power_of_two"),
        "bias": Choice(False, True),
        "layout": Choice(*LAYOUTS, plain=0.5),
        "evaluates": Choice(False, True),
        "data": Seed(),
    },
    check_delayed,
    share=0.3,
)
