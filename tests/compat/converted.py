"""What every test here does: a model and its converted copy do the same, and give the same.

The same up to FP8: an e4m3 code is off by up to 2^-4 of its value, 2^-5.4 on average (uniform
within half a step, the mean of 1/√12 steps over a binade), an e5m2 code by twice that. A product of
two such operands is off by about 4%, in the backward by 6%, independent from element to element. A
gradient passes a handful of products on its way through a small model, whose errors add in squares:
10 to 20%, a few more where softmax or a norm magnifies them. `CLOSE` leaves room for that. A term
that is missing, a weight that is stale, a gradient that is counted twice are off by half or more.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fp8

CLOSE = 0.3
"""Largest rms(error) / rms(expected) of all gradients of a model together."""

EACH = 0.6
"""The same for one parameter: of those whose gradient is no remainder of larger terms."""

LOSS = 0.05
"""Largest |error| of a loss, relative where it is above 1."""


def every(module: nn.Module, name: str) -> bool:
    """A filter that converts whatever the safety rules allow: the default takes large layers."""
    return True


def convert(model: nn.Module, recipe: str = "tensorwise") -> nn.Module:
    return fp8.convert(model, recipe, filter=every)


def twins(model: nn.Module, recipe: str = "tensorwise") -> tuple[nn.Module, nn.Module]:
    """The model, and a converted copy of it."""
    return model, convert(copy.deepcopy(model), recipe)


def converted_layers(model: nn.Module) -> dict[str, fp8.Linear]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fp8.Linear)}
    assert layers, "nothing was converted"
    return layers


class Step(NamedTuple):
    loss: Tensor
    grads: dict[str, Tensor]
    warned: set[str]


def step(model: nn.Module, run: Callable[[nn.Module], Tensor], backward: Any = None) -> Step:
    """One forward and backward of run(model), a loss. The same random numbers every time."""
    model.zero_grad()
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = run(model)
        (backward or torch.Tensor.backward)(loss)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach(), grads, {str(w.message) for w in caught})


def relative(actual: Tensor, expected: Tensor) -> float:
    """rms(error) / rms(expected); NaN where either has one."""
    exact = expected.detach().double()
    error = float((actual.detach().double() - exact).norm())
    return error / float(exact.norm()) if error else 0.0


def assert_close(actual: Step, expected: Step, *, close: float = CLOSE) -> None:
    """Loss and gradients agree up to FP8, every gradient is there, and no warning is new."""
    error = float((actual.loss.double() - expected.loss.double()).abs())
    size = max(1.0, float(expected.loss.abs()))
    assert error / size < LOSS, f"loss {actual.loss}, expected {expected.loss}"
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert actual.grads[name].dtype == grad.dtype, name
        assert bool(actual.grads[name].isfinite().all()), name
    ours, theirs = (
        torch.cat([g.double().flatten() for g in s.grads.values()]) for s in (actual, expected)
    )
    assert relative(ours, theirs) < close
    mean_square = float(theirs.square().mean())
    for name, grad in expected.grads.items():
        if float(grad.double().square().mean()) > 0.1 * mean_square:
            assert relative(actual.grads[name], grad) < max(EACH, close), name
    assert actual.warned <= expected.warned, actual.warned - expected.warned


def assert_same(actual: Step, expected: Step, tolerance: float = 0.0) -> None:
    """Bit for bit: for two converted models, of which neither is the exact one. Where sums are made
    in another order, relative to rms."""
    assert relative(actual.loss, expected.loss) <= tolerance
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert relative(actual.grads[name], grad) <= tolerance, name


def assert_same_keys(converted: nn.Module, model: nn.Module) -> None:
    ours, theirs = converted.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[n].shape == t.shape and ours[n].dtype == t.dtype for n, t in theirs.items())


def assert_trains_alike(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    recipe: str = "tensorwise",
    *,
    close: float = CLOSE,
) -> nn.Module:
    """Convert a copy of the model and compare one step of both. Returns the converted copy."""
    model, copied = twins(model, recipe)
    converted_layers(copied)
    assert_same_keys(copied, model)
    assert_close(step(copied, run), step(model, run), close=close)
    assert_same_keys(copied, model)
    return copied


def noticed(
    change: Callable[[], Any], word: str = "cached_weights", errors: Any = RuntimeError
) -> bool:
    """Makes the change; False if it was refused, by an error that names the word."""
    try:
        change()
    except errors as error:
        if word not in str(error):
            raise
        return False
    return True


def fp8_output(layer: nn.Linear, x: Tensor, recipe: str | None = None) -> Tensor:
    """What the layer must give now, from its weight as it is now: nothing remembered."""
    kind = recipe or getattr(layer, "recipe", "tensorwise")
    bias = None if layer.bias is None else layer.bias.detach().clone()
    with torch.no_grad():
        return fp8.ops.fused_linear(x.detach().clone(), layer.weight.detach().clone(), bias, kind)


def randomize(model: nn.Module, seed: int = 7) -> nn.Module:
    """Weights large enough that outputs are no noise, and small enough that no softmax is sharp;
    biases that count. In place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                fan_in = p.shape[-1] if "experts" in name else p[0].numel()
                p.copy_(0.6 * values * fan_in**-0.5)
            elif "bias" in name:
                p.copy_(0.1 * values)
            elif "norm" in name.lower():
                p.add_(0.1 * values)
            else:  # layer scales, which begin near zero
                p.copy_(1 + 0.1 * values)
    return model


def summary_line(model: nn.Module, name: str) -> str:
    """fp8.summary's line about one module."""
    lines = fp8.summary(model).splitlines()
    return next(line for line in lines if line.split("  ")[0].split(" [")[0].strip() == name)
