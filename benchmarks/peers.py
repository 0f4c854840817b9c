"""What fp8 is compared with, whichever of it is importable: each peer turns a model of nn.Linear
into its own, with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from runs import import_fp8
from torch import nn

Maker = Callable[[nn.Module], nn.Module]


@dataclass
class Peer:
    """name: unique in a run. make: takes a model, may change it, returns what is called."""

    name: str
    make: Maker
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def build(self, model: nn.Module) -> nn.Module:
        """A module with the weights of `model`, which is left as it is."""
        made = self.make(copy.deepcopy(model))
        return made if self.context is nullcontext else _Within(made, self.context)


class _Within(nn.Module):
    """Calls a module inside a context (Transformer Engine's autocast)."""

    def __init__(self, inner: nn.Module, context: Callable[[], AbstractContextManager[object]]):
        super().__init__()
        self.inner = inner
        self._context = context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self._context():
            return self.inner(x)


@dataclass
class Peers:
    found: list[Peer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # name: reason


def baseline() -> Peer:
    return Peer("bf16", lambda model: model)


def ours(recipe: str, everything: bool = True) -> Peer:
    """everything: also linears that fp8.convert by default finds too small to gain."""
    fp8 = import_fp8()
    chosen = (lambda module, name: True) if everything else None

    def make(model: nn.Module) -> nn.Module:
        return fp8.convert(model, recipe=recipe, filter=chosen)

    return Peer(f"fp8 {recipe}", make)


def bf16_compiled() -> Peer:
    return Peer("bf16 compiled", lambda model: torch.compile(model))


def torchao(recipe: str, compiled: bool) -> Peer:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)

    def make(model: nn.Module) -> nn.Module:
        model = convert_to_float8_training(model, config=config)
        return torch.compile(model) if compiled else model

    how = "compiled" if compiled else "eager"
    return Peer(f"torchao {version('torchao')} {recipe} {how}", make)


def transformer_engine(scaling: str) -> Peer:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as te_recipe

    recipes = {
        "delayed": te_recipe.DelayedScaling,
        "current": te_recipe.Float8CurrentScaling,
        "block": te_recipe.Float8BlockScaling,
    }
    recipe = recipes[scaling]()

    def replace(model: nn.Module) -> nn.Module:
        for name, child in list(model.named_children()):
            if type(child) is nn.Linear:
                other = te.Linear(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    params_dtype=child.weight.dtype,
                    device="cuda",
                )
                other.load_state_dict(child.state_dict(), strict=False)
                setattr(model, name, other)
            else:
                replace(child)
        return model

    # Named fp8_autocast before 2.8.
    enter = getattr(te, "autocast", None)
    if enter is None:
        context = lambda: te.fp8_autocast(enabled=True, fp8_recipe=recipe)  # noqa: E731
    else:
        context = lambda: enter(enabled=True, recipe=recipe)  # noqa: E731
    return Peer(f"TE {version('transformer-engine')} {scaling}", replace, context)


def gather(*wanted: tuple[str, Callable[[], Peer]]) -> Peers:
    """The peers that this machine has; the others with the reason."""
    peers = Peers()
    for name, make in wanted:
        try:
            peers.found.append(make())
        except (ImportError, PackageNotFoundError, OSError, RuntimeError) as error:
            peers.skipped[name] = (str(error).splitlines() or [type(error).__name__])[0]
    return peers


def others(compiled: bool = True) -> list[tuple[str, Callable[[], Peer]]]:
    """What `gather` takes, for every peer that is not ours."""
    wanted: list[tuple[str, Callable[[], Peer]]] = []
    if compiled:
        wanted.append(("bf16 compiled", bf16_compiled))
    for recipe in ("tensorwise", "rowwise"):
        for flag in (True, False) if compiled else (False,):
            name = f"torchao {recipe} {'compiled' if flag else 'eager'}"
            wanted.append((name, lambda recipe=recipe, flag=flag: torchao(recipe, flag)))
    for scaling in ("delayed", "current"):
        wanted.append((f"TE {scaling}", lambda scaling=scaling: transformer_engine(scaling)))
    return wanted
