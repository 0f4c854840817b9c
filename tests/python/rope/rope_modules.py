"""Modules that rotate q and k as models do, each by a function of this file, and what tests ask of
their fusion."""

from __future__ import annotations

import functools
import warnings

import torch
from rope_reference import rotate_half, rotate_pairs
from torch import Tensor, nn

import fp8
from fp8.nn import _fused_rope, _rope_spec

HEADS, SIZE, POSITIONS = 4, 16, 6


def llamas(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def cats(q, k, cos, sin, unsqueeze_dim=1):
    """Leaves columns alone where cos has fewer."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    size = cos.shape[-1]

    def rotate(x):
        turned, rest = x[..., :size], x[..., size:]
        return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)

    return rotate(q), rotate(k)


def glms(q, k, cos, sin, unsqueeze_dim=1):
    half = cos.shape[-1] // 2
    cos, sin = (t[..., :half].repeat_interleave(2, -1).unsqueeze(1) for t in (cos, sin))
    return q * cos + rotate_pairs(q) * sin, k * cos + rotate_pairs(k) * sin


def chunks(q, k, cos, sin):
    """cos has a column for each pair."""

    def rotate(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def wide(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim).float(), sin.unsqueeze(unsqueeze_dim).float()
    made = [(x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype) for x in (q, k)]
    return made[0], made[1]


def swapped(query, key, sines, cosines):
    """Other names, and sines first."""
    return llamas(query, key, cosines, sines)


def single(x, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (x * cos) + (rotate_half(x) * sin)


def backwards(q, k, cos, sin, unsqueeze_dim=1):
    """Turns the other way."""
    return llamas(q, k, cos, -sin, unsqueeze_dim)


def detached(q, k, cos, sin, unsqueeze_dim=1):
    q, k = llamas(q, k, cos, sin, unsqueeze_dim)
    return q.detach().requires_grad_(q.requires_grad), k


def in_place(q, k, cos, sin, unsqueeze_dim=1):
    made = llamas(q, k, cos, sin, unsqueeze_dim)
    q.detach().zero_()
    return made


def listed(q, k, cos, sin, unsqueeze_dim=1):
    return [*llamas(q, k, cos, sin, unsqueeze_dim)]


def noisy(q, k, cos, sin, unsqueeze_dim=1):
    q, k = llamas(q, k, cos, sin, unsqueeze_dim)
    return q + 1e-3 * torch.rand_like(q), k


class Attention(nn.Module):
    """What the modules below share."""

    def __init__(self):
        super().__init__()
        width = HEADS * SIZE
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def heads(self, x: Tensor) -> list[Tensor]:
        return [f(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Llamas(Attention):
    def forward(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = llamas(q, k, cos, sin)
        return self.attend(q, k, v)


class Cats(Attention):
    def forward(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = cats(q, k, cos[..., : SIZE // 2], sin[..., : SIZE // 2])
        return self.attend(q, k, v)


class Glms(Attention):
    def forward(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = glms(q, k, cos, sin)
        return self.attend(q, k, v)


class Chunks(Attention):
    def forward(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = chunks(q, k, cos[..., : SIZE // 2], sin[..., : SIZE // 2])
        return self.attend(q, k, v)


class Wide(Attention):
    def forward(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = wide(q, k, cos, sin, None, unsqueeze_dim=1)
        return self.attend(q, k, v)


class Swapped(Attention):
    def forward(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = swapped(key=k, query=q, cosines=cos, sines=sin)
        return self.attend(q, k, v)


class Single(Attention):
    def forward(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = (single(t.transpose(1, 2), cos, sin, unsqueeze_dim=2) for t in (q, k))
        return self.attend(q.transpose(1, 2), k.transpose(1, 2), v)


class Inherited(Llamas):
    """Has its forward from a base."""


def logged(function):
    @functools.wraps(function)
    def run(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return function(self, *args, **kwargs)

    return run


class Decorated(Attention):
    @logged
    @torch.no_grad()
    def forward(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = llamas(q, k, cos, sin)
        return self.attend(q, k, v)


class Supers(Llamas):
    def forward(self, x, cos, sin):
        q, k, v = self.heads(x)
        q, k = llamas(q, k, cos, sin)
        return self.attend(q, k, v) + super().forward(x, cos, sin)


MODULES = {
    kind.__name__: kind
    for kind in (Llamas, Cats, Glms, Chunks, Wide, Swapped, Single, Inherited, Decorated, Supers)
}


def inputs(dtype=torch.bfloat16, device="cpu", positions=POSITIONS) -> list[Tensor]:
    x = torch.randn(2, positions, HEADS * SIZE, device=device).to(dtype)
    angles = torch.randn(2, 2, positions, SIZE, device=device).to(dtype)
    return [x, *angles]


def fuse(model: nn.Module, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing in FP8
        return fp8.convert(model, filter=lambda *_: False, fuse={"rope"}, **options)


def is_fused(module: nn.Module) -> bool:
    return _fused_rope.original(type(module)) is not None


def calls_of(monkeypatch) -> list[Tensor]:
    """The q of every fused call, as a list that grows."""
    seen: list[Tensor] = []
    op = _rope_spec._rope

    def count(*args):
        seen.append(args[0])
        return op(*args)

    monkeypatch.setattr(_rope_spec, "_rope", count)
    return seen


def step(module: nn.Module, given: list[Tensor]) -> list[Tensor]:
    """The result and all gradients."""
    x = given[0].detach().requires_grad_()
    y = module(x, *given[1:])
    if not y.requires_grad:
        return [y]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device)
    leaves = [x, *module.parameters()]
    return [y, *torch.autograd.grad(y, leaves, grad, allow_unused=True)]
