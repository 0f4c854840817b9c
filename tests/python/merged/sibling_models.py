"""Modules whose layers read one tensor, as models write them, and what counts their products."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fp8
from fp8.nn import _fused_siblings

K = 32
HEADS = 4


class Attention(nn.Module):
    """Names that say nothing; grouped queries."""

    def __init__(self, bias: Iterable[bool] = (False, False, False, False)):
        super().__init__()
        q, k, v, o = bias
        self.a, self.b = nn.Linear(K, K, q), nn.Linear(K, K // 2, k)
        self.c, self.d = nn.Linear(K, K // 2, v), nn.Linear(K, K, o)

    def forward(self, hidden_states):
        shape = (*hidden_states.shape[:-1], -1, K // HEADS)
        q = self.a(hidden_states).view(shape).transpose(1, 2)
        k = self.b(hidden_states).view(shape).transpose(1, 2)
        v = self.c(hidden_states).view(shape).transpose(1, 2)
        return self.attend(q, k, v)

    def attend(self, q, k, v):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2)
        return self.d(y.reshape(*y.shape[:2], -1))


class Block(nn.Module):
    """Attention and a gated MLP."""

    def __init__(self, attention: nn.Module | None = None):
        super().__init__()
        self.attention = attention or Attention()
        self.gate, self.up = nn.Linear(K, 48), nn.Linear(K, 48)
        self.down = nn.Linear(48, K)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def convert(model: nn.Module, recipe: str = "tensorwise", kinds=("siblings",)) -> nn.Module:
    """Every linear in FP8, and siblings fused; kinds=False: without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fp8.convert(model, recipe, filter=lambda *_: True, fuse=kinds)


def pair(module: nn.Module, recipe: str = "rowwise", dtype=torch.bfloat16):
    """The module fused, and a copy that is not."""
    module = module.to(dtype)
    plain = convert(copy.deepcopy(module), recipe, kinds=False)
    return convert(module, recipe), plain


def is_fused(module: nn.Module) -> bool:
    return _fused_siblings.original(type(module)) is not None


class Products(TorchDispatchMode):
    """Counts forward operators: of several layers, and of one."""

    def __init__(self):
        super().__init__()
        self.merged: list[int] = []  # layers of each
        self.single = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.fp8._merged_forward.default, torch.ops.fp8.merged_linear.default):
            self.merged.append(len(args[1]))
        self.single += func in (
            torch.ops.fp8._linear_forward.default,
            torch.ops.fp8.fused_linear.default,
        )
        return func(*args, **(kwargs or {}))


def products(call: Callable[..., object], *args: object, **kwargs: object) -> tuple[list[int], int]:
    with Products() as counter:
        call(*args, **kwargs)
    return counter.merged, counter.single


def data(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(*(shape or (2, 9)), K, generator=generator).to(dtype)


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of a step."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.device, y.dtype)
    y.backward(dy)
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {"y": y.detach(), "dx": x.grad} | grads


def assert_close_step(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """y to the bit, with a scale for each row; gradients as close as one more rounding of codes
    leaves them: those of layers that are computed together share the scales of rows. A rounding to
    e4m3 changes an element by 2^-4 of it at most, two of them (dy, and what came of it)."""
    ours, theirs = step(fused, x), step(plain, x)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["y"], theirs["y"])
    for name, grad in ours.items():
        error = (grad.float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert float(error) < 2**-3, name
