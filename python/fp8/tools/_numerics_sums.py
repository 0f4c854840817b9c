"""The figures of `fp8.numerics`, added up on the device."""

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from ._observations import Key
from ._quantization import SUMS

FIGURES = ("amax", "sqnr_db", "saturated", "flushed")


@dataclass(frozen=True)
class Spread:
    """A figure over the calls that have it; NaN where none has."""

    mean: float = math.nan
    min: float = math.nan
    max: float = math.nan


@dataclass(frozen=True)
class NumericsRow:
    """One operand of one layer, as one product reads it."""

    layer: str
    """Its name in the model."""
    operand: str
    """x, weight or dy."""
    product: str
    """fprop, dgrad or wgrad: the first of those that read this quantization. A recipe with a scale
    per row or block quantizes an operand anew for each product that contracts along its other
    side."""
    recipe: str
    dtype: str
    """e4m3 or e5m2."""
    scaling: str
    """dynamic, static or delayed."""
    calls: int
    amax: Spread
    sqnr_db: Spread
    saturated: Spread
    """Shares, from 0 to 1."""
    flushed: Spread
    nonfinite: int
    """Elements of all calls that are NaN or Inf."""


class Sums:
    """What was seen of each operand: a few numbers each, whatever the number of calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a backward runs in a thread for each device
        self._totals: dict[tuple[Key, torch.device], _Total] = {}

    def add(self, key: Key, sums: Tensor) -> None:
        """One call's SUMS, [len(SUMS)] float64."""
        place = (key, sums.device)
        with self._lock:
            if place not in self._totals:
                self._totals[place] = _Total(sums.device)
            self._totals[place].add(sums)

    def rows(self) -> list[NumericsRow]:
        """In the order in which they were first seen. Waits for the devices."""
        totals: dict[Key, list[_Total]] = {}
        for (key, device), total in self._totals.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            totals.setdefault(key, []).append(total)
        self._totals = {}
        return [_row(key, parts) for key, parts in totals.items()]


class _Total:
    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # normal tensors, which any later mode may write
            shape = len(FIGURES)
            options = {"dtype": torch.float64, "device": device}
            self.sum = torch.zeros(shape, **options)  # type: ignore[call-overload]
            self.least = torch.full((shape,), math.inf, **options)  # type: ignore[call-overload]
            self.most = torch.full((shape,), -math.inf, **options)  # type: ignore[call-overload]
            self.known = torch.zeros(shape, **options)  # type: ignore[call-overload]
            self.nonfinite = torch.zeros((), **options)  # type: ignore[call-overload]
        self.calls = 0

    def add(self, sums: Tensor) -> None:
        one = dict(zip(SUMS, sums.unbind(), strict=True))
        figures = torch.stack(
            [
                one["amax"],
                10 * torch.log10(one["signal"] / one["noise"]),  # NaN where all is zero
                one["saturated"] / one["elements"],
                one["flushed"] / one["nonzero"],
            ]
        )
        known = ~figures.isnan()
        self.sum += torch.where(known, figures, 0.0)
        torch.minimum(self.least, torch.where(known, figures, math.inf), out=self.least)
        torch.maximum(self.most, torch.where(known, figures, -math.inf), out=self.most)
        self.known += known
        self.nonfinite += one["nonfinite"]
        self.calls += 1


def _row(key: Key, parts: list[_Total]) -> NumericsRow:
    sums = torch.stack([part.sum.cpu() for part in parts]).sum(0).tolist()
    known = torch.stack([part.known.cpu() for part in parts]).sum(0).tolist()
    least = torch.stack([part.least.cpu() for part in parts]).amin(0).tolist()
    most = torch.stack([part.most.cpu() for part in parts]).amax(0).tolist()
    spreads = [
        Spread(sums[i] / known[i], least[i], most[i]) if known[i] else Spread()
        for i in range(len(FIGURES))
    ]
    calls = sum(part.calls for part in parts)
    nonfinite = int(sum(part.nonfinite.item() for part in parts))
    amax, sqnr, saturated, flushed = spreads
    return NumericsRow(*key, calls, amax, sqnr, saturated, flushed, nonfinite)
