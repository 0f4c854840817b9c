"""One operand as a product reads it: quantized by fp8's own operators, and measured against the
high-precision tensor that it was made of.

Everything stays on the device; nothing here waits for it. Tensors are read in blocks of rows, so
that what is needed beside them is small.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import _quantize as ops

_ELEMENTS = 1 << 22  # of a block of rows, some 100 MB on the way
_BLOCK = 128  # rows of a scale in squares of 128 x 128
# The largest value, and half the step below it: rounded to nearest, what lies no further beyond
# the largest value than that is not saturated.
_LARGEST = {torch.float8_e4m3fn: (448.0, 16.0), torch.float8_e5m2: (57344.0, 4096.0)}

SUMS = ("amax", "signal", "noise", "saturated", "flushed", "nonzero", "nonfinite", "elements")
"""What `measure` returns of each part, in this order."""


class Format(NamedTuple):
    """How an operand is quantized."""

    dtype: torch.dtype
    granularity: str
    """tensorwise, rowwise, 1x128 or 128x128."""
    power_of_two: bool = False


def quantize(
    x: Tensor, form: Format, *, scale: Tensor | None = None, amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(data, scale) of x, [M, K] in high precision.

    scale: a static one; amax: that which makes the scale instead of x's own, as a history or
    another tensor of the same scale gives it, no smaller than x's; [] float32. Both tensorwise.
    """
    kind, dtype, option = form.granularity, form.dtype, form.power_of_two
    if kind == "rowwise":
        return ops.quantize_rowwise(x, dtype, power_of_two=option)
    if kind == "1x128":
        return ops.quantize_blockwise_1x128(x, dtype, power_of_two=option)
    if kind == "128x128":
        return ops.quantize_blockwise_128x128(x, dtype, power_of_two=option)
    if scale is not None:
        return ops.quantize_tensorwise(x, dtype, scale)
    if amax is None:
        return ops.quantize_tensorwise(x, dtype, power_of_two=option)
    # Quantized beside amax: a scale made of it would be one more division, and other codes.
    # Non-finite values do not enter such a scale.
    finite = torch.where(x.isfinite(), x, 0.0).float()
    row = amax.expand(1, x.size(1))
    data, made = ops.quantize_tensorwise(torch.cat([finite, row]), dtype, power_of_two=option)
    return data[:-1], made


def measure(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    parts: Sequence[int] | None = None,
    dim: int = 0,
) -> Tensor:
    """SUMS of x, [M, K], and its codes: float64 [number of parts, len(SUMS)].

    Of finite values of x, but for `nonfinite`: amax, Σ x², Σ (x - decoded)², how many saturated
    (beyond the largest value by more than half a step), how many of the `nonzero` ones have code 0.

    parts: the sizes of parts along `dim`, each measured apart; None: all of x.
    """
    sizes = list(parts) if parts is not None else [x.shape[dim]]
    sums = x.new_zeros((len(sizes), len(SUMS)), dtype=torch.float64)
    rows, columns = x.shape
    step = max(_BLOCK, _ELEMENTS // max(columns, 1) // _BLOCK * _BLOCK)
    for start in range(0, rows if columns else 0, step):
        stop = min(start + step, rows)
        block = _Block(x[start:stop], data[start:stop], _rows_of(scale, rows, start, stop))
        at = 0
        for part, size in enumerate(sizes):
            first, last = at, at + size
            at = last
            if dim == 0:
                first, last = max(first - start, 0), min(last, stop) - start
            if first < last:
                index = (slice(first, last),) if dim == 0 else (slice(None), slice(first, last))
                block.add_to(sums[part], index)
    return sums


def _rows_of(scale: Tensor, rows: int, start: int, stop: int) -> Tensor:
    if scale.dim() == 0:
        return scale
    if scale.size(0) == rows:
        return scale[start:stop]
    return scale[start // _BLOCK : -(-stop // _BLOCK)]


class _Block:
    """Rows of an operand, decoded."""

    def __init__(self, x: Tensor, data: Tensor, scale: Tensor) -> None:
        largest, half = _LARGEST[data.dtype]
        codes = data.float().abs()
        decoded = ops.dequantize(data, scale, torch.float32)
        self.finite = x.isfinite()
        self.x = torch.where(self.finite, x.float(), 0.0)
        self.error = torch.where(self.finite, decoded - self.x, 0.0)
        beyond = self.x.abs() > decoded.abs() * (1 + half / largest)
        self.saturated = (codes == largest) & beyond
        self.nonzero = self.x != 0
        self.flushed = (codes == 0) & self.nonzero

    def add_to(self, sums: Tensor, index: tuple[slice, ...]) -> None:
        x = self.x[index]
        torch.maximum(sums[0], x.abs().amax().double(), out=sums[0])
        finite = self.finite[index]
        counts = (self.saturated[index], self.flushed[index], self.nonzero[index], ~finite)
        sums[1:] += torch.stack(
            [
                x.double().square().sum(),
                self.error[index].double().square().sum(),
                *(count.sum(dtype=torch.float64) for count in counts),
                finite.sum(dtype=torch.float64) * 0 + finite.numel(),
            ]
        )
