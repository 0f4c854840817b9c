"""Sample calls of mlp and what it is differentiated through."""

from __future__ import annotations

from copy import deepcopy

import torch
from sample import DELAYED, OPS, POWER_OF_TWO, RECIPES, Sample, Table
from torch import Tensor

import fp8
from fp8.ops import make_history

_MLPS = (
    # shape of x, I, H, form (0 plain, 1 separate, 2 merged), biases
    ((32, 64), 48, 64, 1, False),
    ((2, 3, 20), 7, 9, 2, True),
    ((17, 32), 32, 16, 0, True),
    ((0, 16), 16, 16, 1, True),
)


def _mlp_tensors(
    device: str, shape: tuple[int, ...], features: int, out: int, form: int, bias: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """x, gate, up, down; the biases."""

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    wide = features * (2 if form == 2 else 1)
    separate = form == 1
    up = draw(features, shape[-1]) if separate else None
    tensors = [draw(*shape), draw(wide, shape[-1]), up, draw(out, features)]
    biases = [draw(wide), draw(features) if separate else None, draw(out)]
    return tensors, biases if bias else [None] * 3


def _histories(device: str, separate: bool) -> dict[str, Tensor]:
    names = ("gate", "up", "down") if separate else ("gate", "down")
    return {f"{name}_history": make_history(device) for name in names}


def _mlp(device: str) -> list[Sample]:
    found = []
    for turn, problem in enumerate(_MLPS * len(RECIPES)):
        recipe = RECIPES[turn // len(_MLPS)]
        tensors, biases = (
            [None if t is None else t.requires_grad_() for t in group]
            for group in _mlp_tensors(device, *problem)
        )
        options = dict(zip(("gate_bias", "up_bias", "down_bias"), biases, strict=True))
        options |= {"recipe": recipe, "save": ("bf16", "recompute", "fp8")[turn % 3]}
        options["activation"] = ("silu", "gelu", "relu_squared")[turn // 3 % 3]
        if recipe == "delayed":
            options |= _histories(device, problem[3] == 1)
        found.append(Sample(f"{recipe} {problem}", tuple(tensors), options))
    tensors, _ = _mlp_tensors(device, *_MLPS[0])
    found.append(Sample("defaults, no grad", tuple(tensors)))
    return found


_ALL_OF_MLP, _RECOMPUTE, _FP8 = 127, 128, 256  # bits of `needs` (csrc/torch/mlp/mlp.h)


def _mlp_needs(form: int, bias: bool, needs: int) -> int:
    """Of these, what the form has."""
    up = 0 if form == 1 else 4 | 32
    return needs & ~up & ~(0 if bias else 16 | 32 | 64)


def _mlp_forward(device: str) -> list[Sample]:
    found = []
    wanted = (_ALL_OF_MLP, 8, 0, _ALL_OF_MLP | _RECOMPUTE, _ALL_OF_MLP | _FP8, 8 | _FP8)
    for turn, recipe in enumerate((*range(len(RECIPES)), POWER_OF_TWO)):
        # Each problem with another need, in turns: all of them are too many for opcheck.
        for place, problem in enumerate(_MLPS):
            tensors, biases = _mlp_tensors(device, *problem)
            needs = _mlp_needs(*problem[3:], wanted[(turn + place) % len(wanted)])
            activation = 4 if problem[3] == 0 else 5
            args = (*tensors, *biases, activation, False, 1.702, 7.0, recipe, needs)
            kwargs = _histories(device, problem[3] == 1) if recipe == DELAYED else {}
            found.append(Sample(f"{problem} {recipe} needs {needs}", args, kwargs))
    return found


def _mlp_backward(device: str) -> list[Sample]:
    found = []
    for sample in _mlp_forward(device):
        x, gate, up, down, gate_bias, up_bias, _, *options, recipe, needs = sample.args
        if needs == 0:
            continue
        y, gate_out, up_out, *scales = OPS._mlp_forward(*sample.args, **deepcopy(sample.kwargs))
        gate_scale, up_scale, x_t, x_scale, *amaxes = scales
        fp8_wgrad = fp8.RECIPES[RECIPES[recipe & 255]].wgrad == "fp8"
        again = bool(needs & _RECOMPUTE)
        saved = (x, None) if again or not fp8_wgrad else (x_t, x_scale)
        products = (None, None) if again else (gate_out, None if up is None else up_out)
        codes = (None, None)
        if needs & _FP8:
            codes = (gate_scale, None if up is None else up_scale)
        one_scale = fp8.RECIPES[RECIPES[recipe & 255]].granularity == "tensorwise"
        amaxes = [a if one_scale and a.dim() == 0 else None for a in amaxes]
        form = 1 if up is not None else 2 if gate.shape[0] == 2 * down.shape[1] else 0
        weights = (gate, up, down, gate_bias, up_bias)
        args = (torch.randn_like(y), *saved, *products, *codes, *weights, *amaxes)
        sizes = (x.shape[-1], down.shape[1], form)
        found.append(
            Sample(sample.name, (*args, *sizes, *options, recipe, needs), deepcopy(sample.kwargs))
        )
    return found


TABLE: Table = {
    "mlp": _mlp,
    "_mlp_forward": _mlp_forward,
    "_mlp_backward": _mlp_backward,
}
