"""What fp8 is compared with, whichever of it is importable: each peer turns a model of nn.Linear
into its own, with the same weights."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from runs import import_fp8
from shapes import RECIPES
from torch import nn

DELAYED_CALLS = 20  # after which fp8's delayed scales come from calls before

Maker = Callable[[nn.Module], nn.Module]


@dataclass
class Peer:
    """name: unique in a run. make: takes a model, may change it, returns what is called. settle:
    steps before which it does not run as it will go on: delayed scaling looks back on 16."""

    name: str
    make: Maker
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    settle: int = 0

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


def ours(
    recipe: str, everything: bool = True, fuse: bool | frozenset[str] = True, save: str = "bf16"
) -> Peer:
    """everything: also linears that fp8.convert by default finds too small to gain. fuse, save: as
    fp8.convert's."""
    fp8 = import_fp8()
    chosen = (lambda module, name: True) if everything else None

    def make(model: nn.Module) -> nn.Module:
        return fp8.convert(model, recipe=recipe, filter=chosen, fuse=fuse, save=save)

    return Peer(f"fp8 {recipe}", make, settle=DELAYED_CALLS if recipe == "delayed" else 0)


def compiled(model: nn.Module) -> nn.Module:
    # All variants share the code of nn.Sequential.forward, and with it one limit.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(model)


def bf16_compiled() -> Peer:
    return Peer("bf16 compiled", compiled)


def torchao(recipe: str, how: str) -> Peer:
    """how: "compiled" or "eager"."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)

    def make(model: nn.Module) -> nn.Module:
        model = convert_to_float8_training(model, config=config)
        return compiled(model) if how == "compiled" else model

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
    settle = DELAYED_CALLS if scaling == "delayed" else 0
    return Peer(f"TE {version('transformer-engine')} {scaling}", replace, context, settle)


def gather(*wanted: tuple[str, Callable[[], Peer]]) -> Peers:
    """The peers that this machine has; the others with the reason."""
    peers = Peers()
    for name, make in wanted:
        try:
            peers.found.append(make())
        except (ImportError, PackageNotFoundError, OSError, RuntimeError) as error:
            peers.skipped[name] = reason(error)
    return peers


def reason(error: Exception) -> str:
    """One line of it."""
    return (str(error).splitlines() or [type(error).__name__])[0]


PEERS: dict[str, Callable[[], Peer]] = {
    "bf16 compiled": bf16_compiled,
    "torchao tensorwise compiled": lambda: torchao("tensorwise", "compiled"),
    "torchao tensorwise eager": lambda: torchao("tensorwise", "eager"),
    "torchao rowwise compiled": lambda: torchao("rowwise", "compiled"),
    "torchao rowwise eager": lambda: torchao("rowwise", "eager"),
    "TE delayed": lambda: transformer_engine("delayed"),
    "TE current": lambda: transformer_engine("current"),
}


def too_late(peer: Peer, deadline: float) -> bool:
    """Whether to leave a peer out because it compiles, which is slow, and time.monotonic() has
    passed the deadline."""
    return peer.name.endswith(" compiled") and time.monotonic() > deadline


def budget_argument(parser: argparse.ArgumentParser, seconds: int) -> None:
    parser.add_argument(
        "--budget",
        type=float,
        default=seconds,
        metavar="S",
        help="seconds after which no further peer is compiled (default %(default)s)",
    )


def standard(
    recipes: Iterable[str] = RECIPES, others: Iterable[str] = (), everything: bool = True
) -> Peers:
    """bf16 first, then our recipes, then the named PEERS. everything: see `ours`."""
    wanted: list[tuple[str, Callable[[], Peer]]] = [("bf16", baseline)]
    wanted += [(f"fp8 {r}", lambda r=r: ours(r, everything)) for r in recipes]
    return gather(*wanted, *((name, PEERS[name]) for name in others))


def autotune(module: nn.Module, tokens: int, wanted: bool) -> bool:
    """Measures cuBLASLt's algorithms for each fp8.Linear of the module, which is on the GPU, at
    that many tokens. Returns whether it did: not for peers, nor where fp8 has no autotune or it
    fails, which stderr says; the benchmark is worth having without it."""
    fp8 = import_fp8()
    ours = any(isinstance(child, fp8.Linear) for child in module.modules())
    if not (wanted and ours and hasattr(fp8, "autotune")):
        return False
    try:
        fp8.autotune(module, tokens=tokens)
    except Exception as error:
        print(f"fp8.autotune failed at {tokens} tokens: {reason(error)}", file=sys.stderr)
        return False
    return True


def autotune_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-autotune", action="store_true", help="cuBLASLt's first choice of algorithm for fp8"
    )
