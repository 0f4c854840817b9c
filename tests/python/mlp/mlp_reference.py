"""An MLP composed of fused_linear and eager activations, which ops.mlp has the bits of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fp8

RECIPES = tuple(fp8.RECIPES)
FORMS = ("separate", "merged", "gate second", "plain")
NAMES = ("x", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: torch.square(F.relu(x)),
}


def activate(activation: str, gate: Tensor, up: Tensor | None) -> Tensor:
    """h, as a model would write it."""
    if activation == "clamped_silu":
        gate = gate.clamp(max=7.0)
        up = up.clamp(min=-7.0, max=7.0)
        glu = gate * torch.sigmoid(gate * 1.702)
        return (up + 1) * glu
    h = ACTIVATIONS[activation](gate)
    return h if up is None else h * up


@dataclass
class Problem:
    """Leaves by name, None where there is none, and dy."""

    leaves: dict[str, Tensor | None]
    dy: Tensor
    form: str
    options: dict[str, Any] = field(default_factory=dict)

    def fused(self, leaves: dict[str, Tensor | None], **options: Any) -> Tensor:
        x, gate, up, down, *biases = (leaves[name] for name in NAMES)
        named = dict(zip(NAMES[4:], biases, strict=True))
        second = {"gate_second": self.form == "gate second"}
        return fp8.ops.mlp(x, gate, up, down, **named, **second, **(self.options | options))

    def composed(self, leaves: dict[str, Tensor | None], **options: Any) -> Tensor:
        options = self.options | options
        recipe = options.get("recipe", "tensorwise")
        histories = {
            name: {"history": options[f"{name}_history"]} if f"{name}_history" in options else {}
            for name in ("gate", "up", "down")
        }

        def linear(name: str, x: Tensor) -> Tensor:
            weight, bias = leaves[name], leaves[f"{name}_bias"]
            return fp8.ops.fused_linear(x, weight, bias, recipe, **histories[name])

        gate, up = linear("gate", leaves["x"]), None
        if self.form == "separate":
            up = linear("up", leaves["x"])
        elif self.form != "plain":
            gate, up = gate.chunk(2, dim=-1)
            if self.form == "gate second":
                gate, up = up, gate
        return linear("down", activate(options.get("activation", "silu"), gate, up))

    def fresh(self, needed: set[str] | None = None) -> dict[str, Tensor | None]:
        """New leaves; those of `needed` want a gradient."""
        return {
            name: None
            if t is None
            else t.detach().clone().requires_grad_(needed is None or name in needed)
            for name, t in self.leaves.items()
        }


def problem(
    device: str,
    shape: tuple[int, ...] = (48, 64),
    features: int = 96,
    out: int = 64,
    form: str = "separate",
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Problem:
    """x [*shape], of down [out, features]; values whose gates are on both sides of every bend."""
    k = shape[-1]
    double = 2 if form in ("merged", "gate second") else 1
    sizes: dict[str, tuple[int, ...] | None] = {
        "x": shape,
        "gate": (double * features, k),
        "up": (features, k) if form == "separate" else None,
        "down": (out, features),
        "gate_bias": (double * features,) if bias else None,
        "up_bias": (features,) if bias and form == "separate" else None,
        "down_bias": (out,) if bias else None,
    }
    unit, unit_h = max(k, 1) ** -0.5, max(features, 1) ** -0.5
    scale = {"x": 1.0, "gate": 2 * unit, "up": 4 * unit, "down": unit_h}
    leaves = {
        name: None
        if size is None
        else (torch.randn(size, device=device) * scale.get(name, 0.5)).to(dtype)
        for name, size in sizes.items()
    }
    dy = torch.randn(*shape[:-1], out, device=device).to(dtype)
    return Problem(leaves, dy, form, options)


@dataclass
class Outcome:
    y: Tensor
    grads: dict[str, Tensor | None]


def run(
    call: Callable[..., Tensor], leaves: dict[str, Tensor | None], dy: Tensor, **options: Any
) -> Outcome:
    y = call(leaves, **options)
    if y.requires_grad:
        y.backward(dy)
    return Outcome(y.detach(), {n: None if t is None else t.grad for n, t in leaves.items()})


def stored(t: Tensor) -> Tensor:
    """What the codes of t's rows stand for."""
    return fp8.ops.dequantize(*fp8.ops.quantize_rowwise(t), t.dtype)


def of_stored(case: Problem, needed: set[str] | None = None, **options: Any) -> Outcome:
    """What save="fp8" has the bits of: "bf16", whose products become what their codes stand for as
    they are saved."""
    leaves = case.fresh(needed)
    owners = {t.untyped_storage().data_ptr() for t in leaves.values() if t is not None}
    features = case.leaves["down"].shape[1]
    wide = features * (2 if case.form in ("merged", "gate second") else 1)
    rows = case.leaves["x"].numel() // case.leaves["x"].shape[-1]

    def pack(t: Tensor) -> Tensor:
        product = t.dtype == case.dy.dtype and t.shape == (rows, wide)
        return stored(t) if product and t.untyped_storage().data_ptr() not in owners else t

    def call(leaves: dict[str, Tensor | None], **options: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return case.fused(leaves, save="bf16", **options)

    return run(call, leaves, case.dy, **options)
