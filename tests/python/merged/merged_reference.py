"""merged_linear as one fused_linear whose weight is the weights one below the other, split: what it
has the bits of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fp8

RECIPES = tuple(fp8.RECIPES)
GW_HP = tuple(n for n, r in fp8.RECIPES.items() if r.wgrad == "high precision")


@dataclass
class Step:
    """Results and gradients; None where there is none."""

    ys: list[Tensor]
    dx: Tensor
    dweights: list[Tensor | None]
    dbiases: list[Tensor | None]


@dataclass
class Problem:
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None] | None
    dys: list[Tensor]

    @property
    def rows(self) -> list[int]:
        return [len(weight) for weight in self.weights]


def problem(
    shape: tuple[int, ...],
    k: int,
    rows: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    biased: tuple[bool, ...] = (),
    device: str = "cpu",
) -> Problem:
    """Weights and gradients of unlike sizes, so that a scale of the wrong part shows."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    sizes = [1.0, 3.0, 0.2, 10.0, 0.5, 2.0]
    weights = [normal(n, k) * size for n, size in zip(rows, sizes, strict=False)]
    biases = [normal(n) if has else None for n, has in zip(rows, biased, strict=False)]
    dys = [normal(*shape, n) * size for n, size in zip(rows, reversed(sizes), strict=False)]
    return Problem(normal(*shape, k), weights, biases or None, dys)


def leaf(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone().requires_grad_()


def merged(p: Problem, recipe: str, **options: Any) -> Step:
    x, weights = leaf(p.x), [leaf(w) for w in p.weights]
    biases = None if p.biases is None else [leaf(b) for b in p.biases]
    ys = fp8.ops.merged_linear(x, weights, biases, recipe, **options)
    torch.autograd.backward(ys, p.dys)
    dbiases = [b if b is None else b.grad for b in biases or [None] * len(weights)]
    return Step([y.detach() for y in ys], x.grad, [w.grad for w in weights], dbiases)


def joined(p: Problem, recipe: str, **options: Any) -> Step:
    """By fused_linear of what at::cat makes."""
    x, weight, bias = leaf(p.x), leaf(torch.cat(p.weights)), None
    # A bias of zeros is another product, and a gradient with column sums another record.
    if any(b is not None for b in p.biases or []):
        zeros = [w.new_zeros(len(w)) for w in p.weights]
        bias = torch.cat([z if b is None else b for b, z in zip(p.biases, zeros, strict=True)])
        bias = leaf(bias)
    y = fp8.ops.fused_linear(x, weight, bias, recipe, **options)
    y.backward(torch.cat(p.dys, -1))
    dbiases: list[Tensor | None] = [None] * len(p.weights)
    if bias is not None:
        parts = bias.grad.split(p.rows)
        dbiases = [None if b is None else d for b, d in zip(p.biases, parts, strict=True)]
    dweights = list(weight.grad.split(p.rows))
    return Step(list(y.detach().split(p.rows, -1)), x.grad, dweights, dbiases)


def separate(p: Problem, recipe: str) -> Step:
    """By a fused_linear each; dx is their sum, each rounded, and the sum too."""
    x, weights = leaf(p.x), [leaf(w) for w in p.weights]
    biases = [leaf(b) for b in p.biases or [None] * len(p.weights)]
    pairs = zip(weights, biases, strict=True)
    ys = [fp8.ops.fused_linear(x, w, b, recipe) for w, b in pairs]
    torch.autograd.backward(ys, p.dys)
    dbiases = [b if b is None else b.grad for b in biases]
    return Step([y.detach() for y in ys], x.grad, [w.grad for w in weights], dbiases)
