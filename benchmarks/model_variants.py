"""What a training step is measured with: fp8.convert, compilers, and kernels of other libraries,
each applied to a model as its users do. lm_head stays in bf16 with all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import models
import peers
import torch
from model_cases import ModelCase
from peers import Peer
from runs import Row
from shapes import RECIPES
from torch import nn

LIGER = " + Liger"  # how the names end of variants that need it
LAST, BESIDE = "bf16, last", "bf16, beside Liger"  # bf16 again, as a check of the ratios


def compile_layers(model: nn.Module) -> nn.Module:
    """Each decoder layer for itself, in place: layers of one kind share their code."""
    torch._dynamo.config.recompile_limit = 64
    for layer in models.decoder_layers(model):
        layer.compile()
    return model


def in_layers(peer: Peer) -> Callable[[nn.Module], nn.Module]:
    """A peer's linears in each decoder layer."""

    def make(model: nn.Module) -> nn.Module:
        for layer in models.decoder_layers(model):
            peer.make(layer)
        return model

    return make


def ours(recipe: str, compiled: bool = False) -> Peer:
    """fp8.convert with its defaults, experts and choice of layers included."""
    peer = peers.ours(recipe, everything=False)
    if not compiled:
        return peer
    make = peer.make
    name = f"{peer.name} compiled"
    return Peer(name, lambda model: compile_layers(make(model)), settle=peer.settle)


def unfused(recipe: str) -> Peer:
    """Linears and experts alone; the rest as the model has it."""
    peer = peers.ours(recipe, everything=False, fuse=False)
    return Peer(f"{peer.name}, nothing fused", peer.make, settle=peer.settle)


def saving(recipe: str, save: str) -> Peer:
    """What MLPs keep of gate and up for the backward is this."""
    peer = peers.ours(recipe, everything=False, save=save)
    return Peer(f"{peer.name} save={save}", peer.make, settle=peer.settle)


def torchao(recipe: str) -> Peer:
    eager = peers.torchao(recipe, "eager")
    make = in_layers(eager)
    name = eager.name.removesuffix(" eager") + " compiled"
    return Peer(name, lambda model: compile_layers(make(model)))


def transformer_engine(scaling: str) -> Peer:
    """Its linears; norms, attention and experts stay the model's."""
    peer = peers.transformer_engine(scaling)
    return Peer(peer.name, in_layers(peer), peer.context, peer.settle)


def with_liger(peer: Peer) -> Peer:
    """The peer on a model that was built inside patched()."""
    name = f"{peer.name} + Liger {version('liger_kernel')}"
    return Peer(name, peer.make, peer.context, peer.settle)


@contextmanager
def patched(case: ModelCase) -> Iterator[None]:
    """Liger's RoPE, RMSNorm and SwiGLU in transformers' module of this architecture: for models
    that are built and run inside. Losses stay as they are, and experts, which are ours to replace.
    What was patched is put back afterwards."""
    name = case.architecture.model_type
    liger = importlib.import_module("liger_kernel.transformers")
    apply = getattr(liger, f"apply_liger_kernel_to_{name}")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    before = dict(vars(module))
    try:
        apply(
            rope=True,
            rms_norm=True,
            swiglu=not case.mixture,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
        yield
    finally:
        vars(module).update(before)


Factory = Callable[[], Peer]


def _all() -> dict[str, Factory]:
    made: dict[str, Factory] = {"bf16": peers.baseline}
    made |= {f"fp8 {r}": lambda r=r: ours(r) for r in RECIPES}
    made |= {f"fp8 {r}, nothing fused": lambda r=r: unfused(r) for r in RECIPES}
    for save in ("fp8", "recompute"):
        made |= {f"fp8 {r} save={save}": lambda r=r, s=save: saving(r, s) for r in RECIPES}
    made |= {f"TE {s}": lambda s=s: transformer_engine(s) for s in ("delayed", "current")}
    made |= {f"torchao {r} compiled": lambda r=r: torchao(r) for r in ("tensorwise", "rowwise")}
    made |= {f"fp8 {r} compiled": lambda r=r: ours(r, compiled=True) for r in RECIPES}
    made["bf16 compiled"] = lambda: Peer("bf16 compiled", compile_layers)
    for name in ("bf16", *(f"fp8 {r}" for r in RECIPES)):
        made[name + LIGER] = lambda name=name: with_liger(made[name]())
    return made


VARIANTS = _all()


def needs_liger(name: str) -> bool:
    return LIGER in name


def must_work(name: str) -> bool:
    """Whether a variant that fails stops the benchmark: what is ours alone by default, and bf16."""
    return name == "bf16" or (name.startswith("fp8 ") and not needs_liger(name))


def add_compared(rows: list[Row], row: Row) -> None:
    """Adds a variant's row, with its speed and its memory beside those of the first."""
    first = rows[0] if rows else row
    row["speedup"] = first["step_us"]["median"] / row["step_us"]["median"]
    row["peak_ratio"] = row["peak_gib"] / first["peak_gib"]
    rows.append(row)
