"""Mixtures whose experts are FP8, for tests of experts_frozen, and what they compute in fp64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from reference import expand_scale
from torch import Tensor
from torch.nn import functional as F

OPS = torch.ops.fp8
NAMES = ("x", "index", "weights", "gate_up_bias", "down_bias")
GRANULARITIES = ("tensorwise", "rowwise", "blockwise")


class Mixture(NamedTuple):
    """Arguments of experts_frozen, and the weights in high precision that the codes are of."""

    x: Tensor  # [T, H]
    index: Tensor  # [T, k]
    weights: Tensor  # [T, k]
    gate_up: Tensor  # [E, 2 I, H] e4m3
    gate_up_scale: Tensor
    down: Tensor  # [E, H, I] e4m3
    down_scale: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    originals: tuple[Tensor, Tensor]

    def args(self) -> tuple[Any, ...]:
        return self[:9]


def quantize(weight: Tensor, granularity: str, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Expert by expert: codes [E, N, K] and scales, [E, 1, 1], [E, N, 1] or in blocks."""
    op = {
        "tensorwise": OPS.quantize_tensorwise,
        "rowwise": OPS.quantize_rowwise,
        "blockwise": OPS.quantize_blockwise_128x128,
    }[granularity]
    made = [op(matrix, power_of_two=power_of_two) for matrix in weight]
    codes = torch.stack([codes.contiguous().view(torch.uint8) for codes, _ in made])
    scales = torch.stack([scale for _, scale in made])
    if granularity == "tensorwise":
        scales = scales.reshape(-1, 1, 1)
    return codes.view(torch.float8_e4m3fn), scales.contiguous()


def problem(
    granularity: str = "rowwise",
    tokens: int = 96,
    hidden: int = 64,
    features: int = 48,
    experts: int = 6,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    bias: bool = False,
    index: Tensor | None = None,
    power_of_two: bool = False,
) -> Mixture:
    """Made on the CPU, so that every device sees the same values."""
    originals = tuple(
        (torch.randn(experts, n, k) / k**0.5).to(dtype).to(device)
        for n, k in ((2 * features, hidden), (hidden, features))
    )
    weights, drawn = torch.randn(tokens, experts).softmax(-1).topk(top_k)
    biases = [torch.randn(experts, n).to(dtype).to(device) for n in (2 * features, hidden)]
    return Mixture(
        torch.randn(tokens, hidden).to(dtype).to(device),
        (drawn if index is None else index).to(device),
        weights.to(device),
        *quantize(originals[0], granularity, power_of_two),
        *quantize(originals[1], granularity, power_of_two),
        *(biases if bias else (None, None)),
        originals,
    )


def numbers(codes: Tensor, scale: Tensor) -> Tensor:
    """[E, N, K] in fp64."""
    return torch.stack(
        [
            c.double() * expand_scale(s.reshape(()) if s.numel() == 1 else s, c.shape).double()
            for c, s in zip(codes, scale, strict=True)
        ]
    )


def run(mixture: Mixture, *options: Any, **named: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """y, dy, and gradients by name."""
    leaves = leaves_of(mixture)
    y = OPS.experts_frozen(*with_leaves(mixture, leaves), *options, **named)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return y.detach(), dy, dict(zip(leaves, grads, strict=True))


def leaves_of(mixture: Mixture) -> dict[str, Tensor]:
    found = {name: getattr(mixture, name) for name in NAMES if name != "index"}
    return {n: t.detach().clone().requires_grad_() for n, t in found.items() if t is not None}


def with_leaves(mixture: Mixture, leaves: dict[str, Tensor]) -> tuple[Any, ...]:
    return mixture._replace(**leaves).args()


def by_parts(mixture: Mixture, leaves: dict[str, Tensor]) -> Tensor:
    """The same of one expert for every token, by linear_frozen and PyTorch's operators."""
    given = mixture._replace(**leaves)
    pick = {n: given.gate_up_bias if n == "up" else given.down_bias for n in ("up", "down")}
    biases = {n: None if b is None else b[0] for n, b in pick.items()}
    scales = [s[0].reshape(1) if s[0].numel() == 1 else s[0] for s in given[4:7:2]]
    kind = "blockwise" if given.gate_up_scale.size(1) < given.gate_up.size(1) else "rowwise"
    kind = "rowwise" if given.gate_up_scale.numel() == given.gate_up.size(0) else kind
    how = {"input_granularity": kind}
    g = OPS.linear_frozen(given.x, given.gate_up[0], scales[0], biases["up"], **how)
    gate, up = g.float().chunk(2, -1)
    h = (F.silu(gate) * up).to(g.dtype)
    out = OPS.linear_frozen(h, given.down[0], scales[1], biases["down"], **how)
    return out * given.weights.to(out.dtype)
