"""Feed-forward modules as models write them, what counts their nodes, and a comparison of steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from reference import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fp8
from fp8.nn import _fused_mlps

K, FEATURES = 32, 48


class Gated(nn.Module):
    """Names that say nothing, and up before the gate."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False):
        super().__init__()
        self.a, self.b = (nn.Linear(K, FEATURES, bias) for _ in range(2))
        self.c = nn.Linear(FEATURES, K, bias)
        self.act = act

    def forward(self, hidden_states):
        up = self.a(hidden_states)
        return self.c(self.act(self.b(hidden_states)) * up)


class Merged(nn.Module):
    second = False

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False):
        super().__init__()
        self.both, self.out = nn.Linear(K, 2 * FEATURES, bias), nn.Linear(FEATURES, K, bias)
        self.act = act

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        if self.second:
            gate, up = up, gate
        return self.out(up * self.act(gate))


class MergedSecond(Merged):
    second = True


class Plain(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu, bias: bool = True):
        super().__init__()
        self.one, self.two = nn.Linear(K, FEATURES, bias), nn.Linear(FEATURES, K, bias)
        self.act = act
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.two(self.drop(self.act(self.one(x)))))


class Clamped(nn.Module):
    """As gpt-oss has it."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(K, FEATURES) for _ in range(2))
        self.down = nn.Linear(FEATURES, K)
        self.alpha, self.limit = 1.702, 2.0

    def forward(self, x):
        gate, up = self.gate(x).clamp(max=self.limit), self.up(x).clamp(-self.limit, self.limit)
        return self.down((up + 1) * (gate * torch.sigmoid(gate * self.alpha)))


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, FEATURES), nn.GELU(), nn.Linear(FEATURES, K))


class SquaredRelu(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "relu_squared": SquaredRelu,
}


def fuse(model: nn.Module, recipe: str = "tensorwise", kinds=("mlp",)) -> nn.Module:
    """Every linear in FP8, and MLPs fused; kinds=False: without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fp8.convert(model, recipe, filter=lambda *_: True, fuse=kinds)


def is_fused(module: nn.Module) -> bool:
    return _fused_mlps.original(type(module)) is not None


class Nodes(TorchDispatchMode):
    """Counts the MLPs that ran as one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fp8._mlp_forward.default or func is torch.ops.fp8.mlp.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def nodes(call: Callable[..., object], *args: object, **kwargs: object) -> int:
    with Nodes() as counter:
        call(*args, **kwargs)
    return counter.count


def pair(
    module: nn.Module, recipe: str = "tensorwise", dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, nn.Module]:
    """The module fused, and a copy that is not."""
    module = module.to(dtype)
    plain = fuse(copy.deepcopy(module), recipe, kinds=False)
    fused = fuse(module, recipe)
    assert is_fused(fused)
    assert not is_fused(plain)
    return fused, plain


def data(dtype: torch.dtype = torch.bfloat16, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(*(shape or (2, 9)), K, generator=generator).to(dtype)


def step(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """y, and the gradients of a step."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.device, y.dtype)
    y.backward(dy)
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return y.detach(), grads | {"x": x.grad}


def assert_same_step(
    fused: nn.Module, plain: nn.Module, x: Tensor, node: bool = True, two: bool = False
) -> None:
    """Bits of y and of every gradient. two: dx through two weights, of which each rounding changes
    half a unit of the largest at most: two of them, of its terms and its sum."""
    with Nodes() as counter:
        y, grads = step(fused, x)
    assert counter.count == int(node)
    expected, theirs = step(plain, x)
    assert_same_bits(y, expected, "y")
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        if name == "x" and two and node:
            step_size = (2 * torch.finfo(y.dtype).eps + 2**-19) * float(theirs[name].abs().max())
            torch.testing.assert_close(grad, theirs[name], rtol=0, atol=step_size)
        else:
            assert_same_bits(grad, theirs[name], name)
