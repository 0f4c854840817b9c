"""Delayed scaling in Python, and layers that have come so far."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import reference
import torch

import fp8

OPS = torch.ops.fp8
WINDOW = 16
RECORDS = 63  # the newest ones, that are searched for a call's x
MARGIN = 4.0  # of a window's largest amax
SLACK = 64.0  # the largest factor between the scale of a call and that of its own amax
SLACK_E5M2 = 1024.0


def suits(used: float, own: float, dtype: torch.dtype) -> bool:
    """Whether x of amax `own` may be cast with the scale of `used`."""
    slack = SLACK_E5M2 if dtype == torch.float8_e5m2 else SLACK
    return own == 0 or own <= used <= slack * own


class Record(NamedTuple):
    own: float  # amax of the call
    used: float  # that which made its scale
    print: int | None  # of the tensor; None of a call with column sums


class History:
    """What delayed scaling is, with nothing of the library in it."""

    def __init__(self, dtype: torch.dtype, power_of_two: bool = False) -> None:
        self.records: list[Record] = []
        self.dtype, self.power_of_two = dtype, power_of_two
        self.from_window = 0  # calls whose scale was that of earlier ones

    def amax(self, x: np.ndarray) -> float:
        """That which makes the scale of this call."""
        own = float(np.abs(x[np.isfinite(x)]).max(initial=0))
        print = hash(x.tobytes())
        same = [record for record in self.records[-RECORDS:] if record.own == own]
        repeated = [record.used for record in same if record.print == print]
        if repeated:
            return repeated[-1]  # and the history stays as it is
        largest = MARGIN * max((record.own for record in self.records[-WINDOW:]), default=0.0)
        largest = min(largest, float(np.finfo(np.float32).max))
        taken_at_once = any(record.print is None for record in same)
        delayed = (
            len(self.records) >= WINDOW and not taken_at_once and suits(largest, own, self.dtype)
        )
        self.from_window += delayed
        used = largest if delayed else own
        self.records.append(Record(own, used, print))
        return used

    def own_amax(self, x: np.ndarray) -> float:
        own = float(np.abs(x).max(initial=0))  # propagates NaN
        finite = own if np.isfinite(own) else 0.0
        self.records.append(Record(finite, finite, None))
        return own

    def cast(self, x: torch.Tensor, own: bool = False) -> tuple[torch.Tensor, torch.Tensor, float]:
        """data, scale and the amax. own: the tensor is read for its column sums, too."""
        values = x.detach().cpu().float().numpy()
        if own:
            used = self.own_amax(values)
        else:
            used = self.amax(values)
            values = np.where(np.isinf(values), np.float32("nan"), values)
        code, scale = reference._quantize(
            values, np.asarray(used, dtype=np.float32), self.dtype, self.power_of_two
        )
        data = reference.from_codes(torch.from_numpy(code), self.dtype).to(x.device)
        return data, torch.from_numpy(np.asarray(scale)).to(x.device), used


def randn(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(device)


def transposed(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.uint8).t().contiguous().view(data.dtype)


def layer_past_the_window(device, dtype=torch.bfloat16, k=64, n=48, **kwargs):
    """An fp8.Linear whose windows are full, of amaxes about 4 for x and dy, and the weight's."""
    layer = fp8.Linear(k, n, bias=False, device=device, dtype=dtype, recipe="delayed", **kwargs)
    for _ in range(WINDOW):
        x = randn(32, k, dtype=dtype, device=device).requires_grad_()
        layer(x).backward(randn(32, n, dtype=dtype, device=device))
        with torch.no_grad():
            layer.weight.copy_(layer.weight.roll(1, 0))  # another tensor, of the same amax
    layer.zero_grad()
    return layer


def is_delayed(layer, x) -> bool:
    """Whether x, a few times smaller than those before, is cast with an earlier scale."""
    with torch.no_grad():
        y = layer(x)
        dynamic = OPS.fused_linear(x, layer.weight.detach().clone(), None, "tensorwise")
    return not torch.equal(y, dynamic)
