"""Delayed scaling in Python, and layers that have come so far."""

from __future__ import annotations

import math

import numpy as np
import reference
import torch

import fp8

OPS = torch.ops.fp8
WINDOW = 16


class History:
    """What delayed scaling is, with nothing of the library in it."""

    def __init__(self, dtype: torch.dtype, power_of_two: bool = False) -> None:
        self.amaxes: list[float] = []
        self.dtype, self.power_of_two = dtype, power_of_two

    def amax(self, x: torch.Tensor) -> float:
        """That which makes the scale of this call."""
        own = float(np.abs(x.detach().cpu().float().numpy()).max(initial=0))  # propagates NaN
        before = [a for a in self.amaxes[-WINDOW:] if math.isfinite(a)]
        self.amaxes.append(own)
        return own if len(self.amaxes) <= WINDOW else max(before, default=0.0)

    def cast(self, x: torch.Tensor, own: bool = False) -> tuple[torch.Tensor, torch.Tensor, float]:
        """data, scale and the amax. own: the tensor is read for another reason, too."""
        used = self.amax(x)
        if own:
            used = self.amaxes[-1]
        values = x.detach().cpu().float().numpy()
        if len(self.amaxes) > WINDOW and not own:
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
    """An fp8.Linear whose scales are delayed from the next call on, x and dy of amax about 4."""
    layer = fp8.Linear(k, n, bias=False, device=device, dtype=dtype, recipe="delayed", **kwargs)
    for _ in range(WINDOW):
        x = randn(32, k, dtype=dtype, device=device).requires_grad_()
        layer(x).backward(randn(32, n, dtype=dtype, device=device))
    layer.zero_grad()
    return layer


def is_delayed(layer, x) -> bool:
    """Whether x, larger than all before, is cast with an earlier scale: it saturates then."""
    with torch.no_grad():
        y = layer(x)
        dynamic = OPS.fused_linear(x, layer.weight.detach().clone(), None, "tensorwise")
    return not torch.equal(y, dynamic)
