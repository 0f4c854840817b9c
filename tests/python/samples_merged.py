"""Sample calls of merged_linear and its private operators, for samples.py: name, arguments, keyword
arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fp8
from fp8.ops import make_history

OPS = torch.ops.fp8
RECIPES = tuple(fp8.RECIPES)
Made = tuple[str, tuple[Any, ...], dict[str, Any]]

# leading dimensions and K of x, rows of the weights, which have a bias
_PROBLEMS = (
    ((32,), 64, (48, 16, 16), (True, True, True)),
    ((2, 3), 20, (7, 8), (False, True)),
    ((), 40, (16, 0, 8), ()),
    ((0,), 16, (8, 8), ()),
    ((6,), 32, (8, 8, 16, 8, 24), ()),
)


def _tensors(device: str, problem: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """x, weights, biases; all with a gradient."""
    shape, k, rows, biased = problem

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype).requires_grad_()

    biases = [leaf(n) if has else None for n, has in zip(rows, biased, strict=False)]
    return leaf(*shape, k), [leaf(n, k) for n in rows], biases or None


def _histories(recipe: str, device: str) -> list[dict[str, Any]]:
    return [{}, {"history": make_history(device)}] if recipe == "delayed" else [{}]


def merged_linear(device: str) -> list[Made]:
    found: list[Made] = []
    for recipe in RECIPES:
        for problem in _PROBLEMS:
            for extra in _histories(recipe, device):
                x, weights, biases = _tensors(device, problem)
                args = (x, weights, biases, recipe)
                found.append((f"{recipe} {problem} {list(extra)}", args, extra))
        x, weights, _ = _tensors(device, _PROBLEMS[0], torch.float32)
        frozen = [weights[0], weights[1].detach(), weights[2]]
        found.append((f"{recipe}, one frozen", (x, frozen, None, f"{recipe}:power_of_two"), {}))
    x, weights, biases = _tensors(device, _PROBLEMS[1])
    plain = (x.detach(), [w.detach() for w in weights], None)
    found.append(("defaults, no grad", plain, {}))
    history = {"history": make_history(device)}
    found.append(("delayed, no grad", (*plain, "delayed"), history))
    return found


def _detached(made: Made) -> tuple[Any, ...]:
    x, weights, biases, *recipe = made[1]
    return (
        x.detach(),
        [w.detach() for w in weights],
        biases and [b if b is None else b.detach() for b in biases],
        *(recipe or ["tensorwise"]),
    )


def merged_linear_functional(device: str) -> list[Made]:
    found = []
    for made in merged_linear(device):
        found.append((made[0], (*_detached(made), made[2].get("history")), {}))
    return found


def merged_forward(device: str) -> list[Made]:
    found: list[Made] = []
    for name, args, extra in merged_linear(device):
        x, weights, biases, recipe = _detached((name, args, extra))
        if ":" in recipe:
            continue
        bias = None
        if biases:
            zeros = [w.new_zeros(w.shape[0]) for w in weights]
            bias = torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])
        for saves in ((True, True), (False, False)):
            call = (x, weights, bias, RECIPES.index(recipe), *saves)
            found.append((f"{name} {saves}", call, {k: v.clone() for k, v in extra.items()}))
    return found


def merged_backward(device: str) -> list[Made]:
    found: list[Made] = []
    for name, (x, weights, _, recipe, *saves), extra in merged_forward(device):
        if not all(saves):
            continue
        _, x_t, x_t_scale, amax = OPS._merged_forward(x, weights, None, recipe, True, True)
        fp8_wgrad = fp8.RECIPES[RECIPES[recipe]].wgrad == "fp8"
        saved = (x_t, x_t_scale) if fp8_wgrad else (x, None)
        one_scale = fp8.RECIPES[RECIPES[recipe]].granularity == "tensorwise"
        dys = [torch.randn(*x.shape[:-1], w.shape[0], device=device).to(x.dtype) for w in weights]
        every = (1 << len(dys)) - 1
        for dx, dweight, dbias in ((True, every, True), (True, 0, False), (False, every ^ 1, True)):
            call = (dys, *saved, weights if dx else [], amax if one_scale else None, x.shape[-1])
            needs = (recipe, dx, dweight, dbias)
            copies = {k: v.clone() for k, v in extra.items()}
            found.append((f"{name} needs {needs}", (*call, *needs), copies))
    return found


def table(sample: Callable[..., Any]) -> dict[str, Callable[[str], list[Any]]]:
    """Rows of samples.TABLE, each call a `sample`."""
    makers = {
        "merged_linear": merged_linear,
        "_merged_forward": merged_forward,
        "_merged_backward": merged_backward,
        "_merged_linear_functional": merged_linear_functional,
    }

    def of(make: Callable[[str], list[Made]]) -> Callable[[str], list[Any]]:
        return lambda device: [sample(*made) for made in make(device)]

    return {name: of(make) for name, make in makers.items()}
