"""Small models in FP8 with every kind of layer, a training step, and what numerics saw of one."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fp8
from fp8.tools import Numerics, NumericsRow

RECIPES = tuple(fp8.RECIPES)
K = 32


class Attention(nn.Module):
    """Siblings q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(K, n) for n in (K, 16, 16, K))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.cat([torch.sigmoid(k) * v, torch.tanh(k) * v], -1) + q)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(K, 48, False), nn.Linear(K, 48, False)
        self.down = nn.Linear(48, K, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()
        self.reentrant = reentrant

    def body(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class Grouped(nn.Module):
    def __init__(self, recipe: str) -> None:
        super().__init__()
        name = recipe if recipe in fp8.GROUPED_RECIPES else "rowwise"
        self.experts = fp8.GroupedLinear(3, K, K, recipe=name)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        offsets = torch.tensor([7, 7, rows.size(0) - 2], dtype=torch.int32, device=x.device)
        return x + self.experts(rows, offsets).view(x.shape)


FUSED = ("mlp", "siblings")


def convert(model: nn.Module, recipe: str, fuse: Collection[str] = FUSED) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fp8.convert(model, recipe, filter=lambda module, name: True, fuse=fuse)


def blocks(
    recipe: str = "tensorwise",
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fuse: Collection[str] = FUSED,
    reentrant: bool | None = None,
) -> nn.Module:
    """Two fused blocks and a linear."""
    torch.manual_seed(3)
    parts = OrderedDict(first=Block(reentrant), second=Block(reentrant), head=nn.Linear(K, 24))
    return convert(nn.Sequential(parts).to(device, dtype), recipe, fuse)


def modules(recipe: str = "tensorwise", device: str = "cpu") -> nn.Module:
    """fp8's own modules."""
    torch.manual_seed(4)
    parts = OrderedDict(
        gated=fp8.GatedMLP(K, 48, recipe=recipe),
        plain=fp8.MLP(K, 48, "relu_squared", recipe=recipe),
        merged=_Sum(fp8.MergedLinear(K, [K, K], recipe=recipe)),
        grouped=Grouped(recipe),
        last=fp8.Linear(K, 24, recipe=recipe),
    )
    return nn.Sequential(parts).to(device, torch.bfloat16)


class _Sum(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layers(x)
        return a * torch.tanh(b)


MODELS: dict[str, Callable[..., nn.Module]] = {"blocks": blocks, "modules": modules}


def batch(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 20, K, generator=generator).to(device, dtype)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and every gradient, which are then taken away."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), x.grad, *grads]


def watched_step(model: nn.Module, *inputs: Tensor) -> Numerics:
    with fp8.numerics(model) as found:
        for x in inputs:
            step(model, x)
    return found


def by_operand(found: Numerics) -> dict[tuple[str, str, str], NumericsRow]:
    rows = {(row.layer, row.operand, row.product): row for row in found.rows}
    assert len(rows) == len(found.rows)
    return rows


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, copy.deepcopy(model)
