"""One training step of a model, and how far two of them are apart."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from converted import Step, every, step
from torch import Tensor, nn

import fp8

REMAINDER = 0.05
"""Gradients whose norm is less than this part of the largest are remainders of larger terms, which
nearly cancel: their errors are measured against that part."""

LOSS = 0.1
"""Largest error of a loss in FP8, relative where it is above 1."""

Loss = Callable[[nn.Module], Tensor]


class Mismatch(AssertionError):
    """Two steps, or two outputs, that should be closer."""


def loss_of(given: dict[str, Tensor]) -> Loss:
    return lambda model: model(**given).loss.float()


def run(model: nn.Module, given: dict[str, Tensor]) -> Step:
    """Loss and every gradient, of the same random numbers each time."""
    return step(model, loss_of(given))


def convert(model: nn.Module, recipe: str, fuse: Any) -> nn.Module:
    """A converted copy: whatever the safety rules allow, since every layer here is small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fp8.convert(copy.deepcopy(model), recipe, filter=every, fuse=fuse)


class Distance(NamedTuple):
    """How far a step is from another one."""

    loss: float  # relative, to the loss or 1
    worst: float  # |a - b| / |b| of the gradient where that is largest
    where: str  # its name
    whole: float  # the same of all gradients as one vector
    cosine: float  # of these

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.2g}, gradients {self.whole:.2g}, "
            f"{self.where} {self.worst:.2g}, cosine {self.cosine:.4f}"
        )


def distance(actual: Step, expected: Step) -> Distance:
    """Raises Mismatch where one has a gradient that the other lacks, or that is not finite."""
    missing = sorted(actual.grads.keys() ^ expected.grads.keys())
    if missing:
        raise Mismatch(f"gradients of one alone: {', '.join(missing[:4])}")
    for name, grad in actual.grads.items():
        if not bool(grad.isfinite().all()) and bool(expected.grads[name].isfinite().all()):
            raise Mismatch(f"the gradient of {name} is not finite")
    size = max(1.0, float(expected.loss.abs()))
    loss = float((actual.loss - expected.loss).abs()) / size
    ours, theirs = (
        {n: g.double().flatten() for n, g in s.grads.items()} for s in (actual, expected)
    )
    norms = {n: float(g.norm()) for n, g in theirs.items()}
    least = REMAINDER * max(norms.values(), default=0.0)
    errors = {n: float((ours[n] - g).norm()) for n, g in theirs.items()}
    each = {n: e / max(norms[n], least, 1e-30) for n, e in errors.items()}
    where = max(each, key=each.__getitem__, default="")
    squares = sum(n * n for n in norms.values())
    error = sum(e * e for e in errors.values())
    ours_squares = sum(float(g.square().sum()) for g in ours.values())
    dot = sum(float(ours[n] @ g) for n, g in theirs.items())
    whole = (error / squares) ** 0.5 if squares else float(error > 0)
    cosine = dot / max((squares * ours_squares) ** 0.5, 1e-30) if error else 1.0
    return Distance(loss, each.get(where, 0.0), where, whole, cosine)


def same_bits(actual: Step, expected: Step) -> bool:
    """Loss and every gradient."""
    if actual.grads.keys() != expected.grads.keys():
        return False
    pairs = [(actual.loss, expected.loss)]
    pairs += [(grad, expected.grads[name]) for name, grad in actual.grads.items()]
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


TRIES = 3


class Beside(NamedTuple):
    """A fused model beside a composed one."""

    found: Distance
    good: bool


def beside(fused: nn.Module, composed: nn.Module, given: dict[str, Tensor], limit: float) -> Beside:
    """A step of both. `limit` is of the gradients; a loss moves less.

    Where a value lies at a tie between two codes, or an amax at a power of two, the last bit of a
    sum decides, and a code of which everything later depends moves the gradients of so small a
    model by percents. With other weights nothing lies there, but a fault is where it was: so what
    is too far apart is asked again, of both models with the same other weights.
    """
    for number in range(TRIES):
        found = distance(run(fused, given), run(composed, given))
        if found.loss < min(LOSS, limit) / 2 and found.whole < limit:
            return Beside(found, True)
        _change_alike((fused, composed), number)
    return Beside(found, False)


def _change_alike(models: tuple[nn.Module, ...], seed: int) -> None:
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, p in sorted(model.named_parameters()):
                p.mul_(1 + 2.0**-6 * torch.randn(p.shape, generator=generator).to(p))
