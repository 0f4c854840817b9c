"""The norms that the probe knows, in plain torch operations."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn._fused_norms import LAYER

_FORMS = ("scale_then_round", "round_then_scale", "scale_by_one_plus")
_USUAL_EPS = (1e-6, 1e-5, 1e-8, 1e-12, 0.0)  # where no attribute has it

Candidate = tuple[str, float, str | None, str | None]  # form, eps, weight, bias


def candidates(
    parameters: dict[str, Tensor], attributes: tuple[tuple[str, Any], ...]
) -> Iterator[Candidate]:
    found = [v for _, v in attributes if isinstance(v, float) and 0 <= v < 0.1]
    every = dict.fromkeys([*found, *_USUAL_EPS, torch.finfo(torch.float32).eps])
    first, second = [*parameters, None, None][:2]
    for eps in every:
        if second is None:
            for form in _FORMS if first is not None else _FORMS[:1]:
                yield form, eps, first, None
            yield LAYER, eps, first, None
        if first is not None:
            yield LAYER, eps, second, first
            yield LAYER, eps, first, second


def expected(x: Tensor, candidate: Candidate, parameters: dict[str, Tensor]) -> Tensor:
    """The candidate in plain torch operations."""
    form, eps, weight_name, bias_name = candidate
    weight = None if weight_name is None else parameters[weight_name]
    if form == LAYER:
        bias = None if bias_name is None else parameters[bias_name]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    hat = x.float()
    hat = hat * torch.rsqrt(hat.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return hat.to(x.dtype)
    if form == "round_then_scale":
        return weight * hat.to(x.dtype)
    factor = 1.0 + weight.float() if form == "scale_by_one_plus" else weight
    return (hat * factor).to(x.dtype)
