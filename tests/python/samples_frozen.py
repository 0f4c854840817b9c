"""Sample calls of linear_frozen and its gradient, for samples.py: name, arguments, keyword
arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

OPS = torch.ops.fp8
Made = tuple[str, tuple[Any, ...], dict[str, Any]]

_QUANTIZE = {
    "tensorwise": OPS.quantize_tensorwise,
    "rowwise": OPS.quantize_rowwise,
    "blockwise": OPS.quantize_blockwise_128x128,
}
_PROBLEMS = (((32,), 64, 48), ((2, 3), 200, 144), ((), 33, 7), ((0,), 16, 8))


def _weight(granularity: str, n: int, k: int, device: str) -> tuple[Any, Any]:
    codes, scale = _QUANTIZE[granularity](torch.randn(n, k, device=device))
    return codes.contiguous(), scale.contiguous()


def linear_frozen(device: str) -> list[Made]:
    found: list[Made] = []
    for granularity in _QUANTIZE:
        for leading, k, n in _PROBLEMS:
            x = torch.randn(*leading, k, device=device, dtype=torch.bfloat16).requires_grad_()
            bias = torch.randn(n, device=device, dtype=torch.bfloat16).requires_grad_()
            args = (x, *_weight(granularity, n, k, device))
            found.append((f"{granularity} {leading} {n}x{k}", args, {}))
            args = (x.detach(), *_weight(granularity, n, k, device), bias)
            options = {"power_of_two": True}
            found.append((f"{granularity} {leading} {n}x{k} bias", args, options))
    for granularity in ("tensorwise", "rowwise"):
        x = torch.randn(5, 48, device=device)
        args = (x, *_weight(granularity, 16, 48, device))
        tensorwise = {"input_granularity": "tensorwise"}
        found.append((f"{granularity} times one scale", args, tensorwise))
        static = (x.half(), *args[1:], None, torch.tensor(0.1, device=device))
        found.append((f"{granularity} times a static scale", static, {}))
    return found


def linear_frozen_backward(device: str) -> list[Made]:
    return [
        (
            f"{granularity} {leading} {n}x{k}",
            (
                torch.randn(*leading, n, device=device, dtype=dtype),
                *_weight(granularity, n, k, device),
                granularity == "blockwise",
                dtype is torch.float16,
            ),
            {},
        )
        for granularity in _QUANTIZE
        for leading, k, n in _PROBLEMS
        for dtype in (torch.bfloat16, torch.float16)
    ]


def table(sample: Callable[..., Any]) -> dict[str, Callable[[str], list[Any]]]:
    def of(make: Callable[[str], list[Made]]) -> Callable[[str], list[Any]]:
        return lambda device: [sample(*made) for made in make(device)]

    return {
        "linear_frozen": of(linear_frozen),
        "_linear_frozen_backward": of(linear_frozen_backward),
    }
