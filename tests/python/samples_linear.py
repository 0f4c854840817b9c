"""Sample calls of fused_linear and what it is differentiated through."""

from __future__ import annotations

from copy import deepcopy

import torch
from sample import DELAYED, OPS, POWER_OF_TWO, RECIPES, Sample, Table
from torch import Tensor

import fp8
from fp8.ops import make_history


def _fused_linear(device: str) -> list[Sample]:
    found = []
    for recipe in RECIPES:
        for shape, n in (((32, 64), 48), ((2, 3, 20), 7), ((40,), 16), ((0, 16), 8)):
            x, weight, bias = (
                torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True)
                for s in (shape, (n, shape[-1]), (n,))
            )
            found.append(Sample(f"{recipe} {shape} bias", (x, weight, bias, recipe)))
            found.append(Sample(f"{recipe} {shape}", (x, weight, None, recipe)))
            found.append(Sample(f"{recipe} {shape} frozen", (x, weight.detach(), None, recipe)))
    x, weight = torch.randn(8, 32, device=device), torch.randn(16, 32, device=device)
    found.append(Sample("defaults, no grad", (x, weight)))
    for recipe in RECIPES:
        leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
        found.append(Sample(f"{recipe}, power of two", (*leaves, None, f"{recipe}:power_of_two")))
    for shape in ((5, 32), (0, 32)):
        x = torch.randn(shape, device=device, requires_grad=True)
        scale = {"input_scale": torch.tensor(0.01, device=device)}
        found.append(Sample(f"static {shape}", (x, weight.clone().requires_grad_()), scale))
        found.append(Sample(f"static {shape}, no grad", (x.detach(), weight), scale))
        args = (x, weight.clone().requires_grad_(), None, "delayed")
        found += _delayed([Sample(f"delayed {shape}", args)])
    args = (x.detach(), weight, None, "delayed:power_of_two")
    return found + _delayed([Sample("delayed, power of two, no grad", args)])


def _delayed(samples: list[Sample]) -> list[Sample]:
    """The same with an empty history."""
    return [
        Sample(f"{s.name}, history", s.args, {"history": make_history(s.args[0].device)})
        for s in samples
    ]


def _linear_forward(device: str) -> list[Sample]:
    found = []
    for recipe in range(len(RECIPES)):
        for shape, n in (((32, 64), 48), ((2, 3, 20), 7), ((0, 16), 8)):
            x = torch.randn(shape, device=device, dtype=torch.bfloat16)
            weight = torch.randn(n, shape[-1], device=device, dtype=torch.bfloat16)
            bias = torch.randn(n, device=device, dtype=torch.bfloat16)
            for saves in ((True, True), (True, False), (False, True), (False, False)):
                what = f"{RECIPES[recipe]} {shape} saves {saves}"
                found.append(Sample(what, (x, weight, bias, recipe, *saves)))
        x, weight = torch.randn(8, 32, device=device), torch.randn(16, 32, device=device)
        args = (x, weight, None, recipe | POWER_OF_TWO, True, True)
        found.append(Sample(f"{RECIPES[recipe]}, power of two", args))
    scale = {"input_scale": torch.tensor([0.01], device=device)}
    found.append(Sample("static", (x, weight, None, 0, True, True), scale))
    return found + _delayed([Sample("delayed", (x, weight, None, DELAYED, True, True))])


def _linear_backward(device: str) -> list[Sample]:
    found = []
    for recipe, name in enumerate(RECIPES):
        for shape, n in (((32, 64), 48), ((2, 3, 20), 7), ((0, 16), 8)):
            x = torch.randn(shape, device=device, dtype=torch.bfloat16)
            weight = torch.randn(n, shape[-1], device=device, dtype=torch.bfloat16)
            dy = torch.randn(*shape[:-1], n, device=device, dtype=torch.bfloat16)
            _, x_t, x_t_scale, amax = OPS._linear_forward(x, weight, None, recipe, True, True)
            fp8_wgrad = fp8.RECIPES[name].wgrad == "fp8"
            saved = (x_t, x_t_scale) if fp8_wgrad else (x, None)
            one_scale = fp8.RECIPES[name].granularity == "tensorwise"
            args = (dy, *saved, weight, amax if one_scale else None, shape[-1], recipe)
            for needs in ((True, True, True), (True, False, False), (False, True, True)):
                found.append(Sample(f"{name} {shape} needs {needs}", (*args, *needs)))
    found += _delayed([s for s in found if s.args[6] == DELAYED])
    return found + [_into_buffer(turn, s) for turn, s in enumerate(found) if s.args[8]]


def _into_buffer(turn: int, sample: Sample) -> Sample:
    """The same with a main_grad, added to or overwritten."""
    dy, *_, in_features, _, _, _, _ = sample.args
    buffer = _buffer(dy.shape[-1], in_features, dy.device.type, turn)
    kwargs = deepcopy(sample.kwargs) | {"main_grad": buffer, "overwrite": turn % 4 == 0}
    return Sample(f"{sample.name} into, turn {turn}", sample.args, kwargs)


def _buffer(n: int, k: int, device: str, turn: int) -> Tensor:
    """A main_grad: fp32, bf16 and transposed ones in turns."""
    if turn % 3 == 2:
        return torch.randn(k, n, device=device).t()
    dtype = torch.bfloat16 if turn % 3 else torch.float32
    return torch.randn(n, k, device=device, dtype=dtype)


def _fused_linear_functional(device: str) -> list[Sample]:
    found = []
    for sample in _fused_linear(device):
        x, weight, bias, recipe = (*sample.args, None, "tensorwise")[:4]
        tensors = [None if t is None else t.detach() for t in (x, weight, bias)]
        scaling = [sample.kwargs.get(name) for name in ("input_scale", "history")]
        found.append(Sample(sample.name, (*tensors, recipe, *scaling)))
    return found


def _fused_linear_into(device: str) -> list[Sample]:
    found = []
    for turn, sample in enumerate(_fused_linear(device)):
        x, weight, bias, recipe = (*sample.args, None, "tensorwise")[:4]
        main_grad = _buffer(*weight.shape, device, turn)
        stand_in = torch.zeros_like(weight) if turn % 2 else None
        args = (x, weight, bias, recipe, main_grad, turn % 4 == 0, stand_in)
        found.append(Sample(f"{sample.name}, turn {turn}", args, deepcopy(sample.kwargs)))
    return found


TABLE: Table = {
    "fused_linear": _fused_linear,
    "_linear_forward": _linear_forward,
    "_linear_backward": _linear_backward,
    "_fused_linear_into": _fused_linear_into,
    "_fused_linear_functional": _fused_linear_functional,
}
