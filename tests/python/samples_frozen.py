"""Sample calls of linear_frozen, experts_frozen and their gradients, for samples.py: name,
arguments, keyword arguments."""

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


def _stack(granularity: str, experts: int, n: int, k: int, device: str) -> tuple[Any, Any]:
    made = [_weight(granularity, n, k, device) for _ in range(experts)]
    codes = torch.stack([codes.view(torch.uint8) for codes, _ in made]).view(torch.float8_e4m3fn)
    return codes, torch.stack([scale for _, scale in made])


_MIXTURES = (  # tokens, hidden, features, experts, top_k
    (24, 64, 48, 4, 2),
    (7, 144, 128, 3, 3),
    (0, 32, 16, 2, 1),
)


def _mixture(
    granularity: str, sizes: tuple[int, ...], dtype: torch.dtype, device: str, bias: bool
) -> list[Any]:
    tokens, hidden, features, experts, top_k = sizes
    weights, index = torch.rand(tokens, experts, device=device).topk(top_k)
    shapes = ((experts, 2 * features), (experts, hidden))
    biases = [torch.randn(shape, device=device, dtype=dtype) if bias else None for shape in shapes]
    return [
        torch.randn(tokens, hidden, device=device, dtype=dtype),
        index,
        weights,
        *_stack(granularity, experts, 2 * features, hidden, device),
        *_stack(granularity, experts, hidden, features, device),
        *biases,
    ]


def experts_frozen(device: str) -> list[Made]:
    found: list[Made] = []
    for granularity in _QUANTIZE:
        for sizes in _MIXTURES:
            plain = _mixture(granularity, sizes, torch.bfloat16, device, False)
            plain[0].requires_grad_()
            found.append((f"{granularity} {sizes}", tuple(plain), {}))
            args = _mixture(granularity, sizes, torch.float16, device, True)
            for leaf in (args[2], *args[7:]):
                leaf.requires_grad_()
            options = (*args, "clamped_silu", True)
            found.append((f"{granularity} {sizes} bias", options, {"power_of_two": True}))
    return found


def experts_frozen_forward(device: str) -> list[Made]:
    return [
        (
            f"{granularity} {sizes}",
            (
                *_mixture(granularity, sizes, torch.bfloat16, device, bias),
                *(0, False, 1.702, 7.0, granularity == "blockwise", bias),
            ),
            {},
        )
        for granularity in _QUANTIZE
        for sizes in _MIXTURES
        for bias in (False, True)
    ]


def experts_frozen_backward(device: str) -> list[Made]:
    found: list[Made] = []
    for name, args, _ in experts_frozen_forward(device):
        y, *kept = OPS._experts_frozen_forward(*args)
        biases = args[8] is not None
        for needs in (1, 2, 1 | 2 | (16 | 32 if biases else 0)):
            given = (torch.randn_like(y), *args[1:9], *kept, *args[9:], needs)
            found.append((f"{name} needs {needs}", given, {}))
    return found


def table(sample: Callable[..., Any]) -> dict[str, Callable[[str], list[Any]]]:
    def of(make: Callable[[str], list[Made]]) -> Callable[[str], list[Any]]:
        return lambda device: [sample(*made) for made in make(device)]

    return {
        "linear_frozen": of(linear_frozen),
        "_linear_frozen_backward": of(linear_frozen_backward),
        "experts_frozen": of(experts_frozen),
        "_experts_frozen_forward": of(experts_frozen_forward),
        "_experts_frozen_backward": of(experts_frozen_backward),
    }
