"""What tests of updates inside fp8.cached_weights share."""

from __future__ import annotations

from typing import Any

import torch
from converted import fp8_output, randomize, relative
from torch import Tensor

import fp8


def layer(recipe: str = "tensorwise", dtype: torch.dtype = torch.float32) -> fp8.Linear:
    return randomize(fp8.Linear(64, 48, recipe=recipe)).to(dtype)


def assert_current(module: fp8.Linear, x: Tensor) -> None:
    """The first calls of `delayed` scale as tensorwise does."""
    recipe = "tensorwise" if module.recipe == "delayed" else module.recipe
    with torch.no_grad():
        y = module(x)
    assert relative(y, fp8_output(module, x, recipe)) < 1e-3


class OldStyle(torch.optim.Optimizer):
    """An optimizer as many programs have: it writes through .data."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"] * 10)
