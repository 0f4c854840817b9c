"""Pre-norm layers as models write them, and what counts the fused calls in them."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings

import torch
from reference import assert_same_bits
from torch import nn

import fp8
from fp8.nn import _fused_residuals

K = 32


class Norm(nn.Module):
    """As Llama's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(K))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


class Parts(nn.Module):
    """What the layers below are made of."""

    norms = Norm

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.first, self.second = self.norms(), self.norms()
        self.mixer, self.mlp = nn.Linear(K, K), nn.Linear(K, K)
        self.dropout = nn.Dropout(0.25)


class Llamas(Parts):
    """As transformers writes it."""

    def forward(self, hidden_states, scale=1.0):
        residual = hidden_states
        hidden_states = self.first(hidden_states)
        hidden_states = self.mixer(hidden_states)
        hidden_states = residual + hidden_states * scale

        residual = hidden_states
        hidden_states = self.second(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


class Short(Parts):
    """As the first Llama's."""

    def forward(self, x):
        h = x + self.mixer(self.first(x))
        out = h + self.mlp(self.second(h))
        return out


class Dropped(Parts):
    def forward(self, x):
        y = self.first(x)
        x = self.dropout(self.mixer(y)) + x
        y = self.second(x)
        return self.dropout(self.mlp(y)) + x


class Layers(Llamas):
    """With torch's LayerNorm."""

    norms = functools.partial(nn.LayerNorm, K)


class Thirds(Parts):
    """Three that read the sum: the norm, and two later."""

    def forward(self, x):
        x = x + self.mixer(x)
        y = self.second(x)
        return x + self.mlp(y), 3 * x


class Inherits(Llamas):
    def forward(self, x):
        return super().forward(x, scale=0.5)


def twice(forward):
    """A decorator, as transformers' are."""

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapped


class Decorated(Parts):
    @twice
    def forward(self, x):
        assert __class__ is Decorated  # noqa: F821
        x = x + self.mixer(self.first(x))
        return x + self.mlp(self.second(x))


def fuse(model, kinds=("norms", "residual")):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing in FP8
        return fp8.convert(model, filter=lambda *_: False, fuse=kinds)


def is_fused(module):
    return any(_fused_residuals.original(kind) is not None for kind in type(module).__mro__)


def pair(module, dtype=torch.bfloat16, device="cpu"):
    """The module with both fusions, and a copy with fused norms alone."""
    module = module.to(device, dtype)
    plain = fuse(copy.deepcopy(module), {"norms"})
    return fuse(module), plain


class Calls(list):
    """The fused calls: "add" of a sum with its norm, "join" of a norm that joins gradients."""

    def __init__(self, monkeypatch):
        for name, short in (("_add_rms_norm", "add"), ("_norm_and_input", "join")):
            own = getattr(_fused_residuals, name)
            monkeypatch.setattr(_fused_residuals, name, functools.partial(self._call, own, short))

    def _call(self, own, short, *args):
        self.append(short)
        return own(*args)

    def during(self, call, *args, **kwargs):
        self.clear()
        call(*args, **kwargs)
        return [*self]


def data(device="cpu", dtype=torch.bfloat16):
    return torch.randn(2, 9, K, generator=torch.Generator().manual_seed(5)).to(device, dtype)


def step(module, x):
    """Outputs, and every gradient."""
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    outputs = module(1 * x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(4)
    dys = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    torch.autograd.backward(outputs, dys)
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    found = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return found | ({} if x.grad is None else {"dx": x.grad}) | grads


def assert_same_step(ours, theirs, x):
    ours, theirs = step(ours, x), step(theirs, x)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_same_bits(value, theirs[name], name)


def line_of(function, text):
    """Of the file, that of the text in a function's source."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)
