"""What `fp8.ops.mlp` makes on the way and does not keep: the products of gate and up, h between
them and down, and their gradients, with the operator's bits.

Called below autograd, where a formula's gradient is written out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import dequantize, quantize_rowwise
from ..recipe import OPTIONS, RECIPES, check_recipe

X, GATE, UP, DOWN = 1, 2, 4, 8
"""Bits of `needs` (csrc/torch/mlp/mlp.h)."""
GATE_OR_UP = GATE | UP
TO_H = X | GATE | UP | 16 | 32
_DOWN_BIAS, _FP8 = 64, 256
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared", "clamped_silu")
"""As the private operators count them (csrc/torch/mlp/unit.h)."""
_PLAIN, _SEPARATE = 0, 1  # forms (mlp.h)

_ops = torch.ops.fp8
_aten = torch.ops.aten


def linears(a: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the layers among the arguments."""
    separate = a["form"] == _SEPARATE if "form" in a else a["up"] is not None
    return ("gate", "up", "down") if separate else ("gate", "down")


def products(a: Mapping[str, Any], results: Any) -> tuple[Tensor, Tensor | None]:
    """Those of a forward, [M, I] or merged [M, 2 I]: its results, or, where it kept none or codes
    of them, made again, with the same scales."""
    if isinstance(results, Tensor) or not results[1].numel() or a["needs"] & _FP8:
        tensors = [a[name] for name in ("x", "gate", "up", "down")]
        biases = [a[f"{name}_bias"] for name in ("gate", "up", "down")]
        activation, recipe = a["activation"], a["recipe"]
        if isinstance(activation, str):
            activation = _ACTIVATIONS.index(activation)
        if isinstance(recipe, str):
            recipe = _number(recipe)
        unit = [activation, *(a[name] for name in ("gate_second", "alpha", "limit"))]
        histories = [_copy(a[f"{name}_history"]) for name in ("gate", "up", "down")]
        needs = X | GATE | UP | DOWN
        results = _ops._mlp_forward.default(
            *(*tensors, *biases, *unit, recipe, needs),
            gate_history=histories[0],
            up_history=histories[1],
            down_history=histories[2],
        )
    return results[1], results[2] if results[2].numel() else None


def kept(
    a: Mapping[str, Any], gate_out: Tensor, up_out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The products as the backward of a forward with these arguments will find them."""
    if not a.get("needs", 0) & _FP8:
        return gate_out, up_out
    found = [
        None if t is None else dequantize(*quantize_rowwise(t), t.dtype) for t in (gate_out, up_out)
    ]
    assert found[0] is not None
    return found[0], found[1]


def _decoded(codes: Tensor, scale: Tensor, a: Mapping[str, Any], features: int) -> Tensor:
    """Kept codes, without their padding."""
    rows = a["dy"].numel() // a["dy"].size(-1)
    return dequantize(codes[:rows, :features], scale[:rows, None], a["dy"].dtype)


def _number(recipe: str) -> int:
    """As private operators carry a recipe (csrc/torch/common/recipe.h)."""
    found = check_recipe(recipe)
    options: int = sum(getattr(found, option) << 8 + i for i, option in enumerate(OPTIONS))
    return list(RECIPES).index(found.name) | options


def _gate_and_up(
    a: Mapping[str, Any], gate_out: Tensor, up_out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Of the products, or of nothing but one: views."""
    if up_out is not None or _is_plain(a, gate_out):
        return gate_out, up_out
    first, second = gate_out.chunk(2, dim=-1)
    return (second, first) if a["gate_second"] else (first, second)


def _is_plain(a: Mapping[str, Any], gate_out: Tensor) -> bool:
    if "form" in a:
        return bool(a["form"] == _PLAIN)
    return bool(a["down"].size(1) == gate_out.size(-1))


def hidden(a: Mapping[str, Any], gate_out: Tensor, up_out: Tensor | None) -> Tensor:
    """h [M, I], rounded as eager code does."""
    gate, up = _gate_and_up(a, gate_out, up_out)
    name = _name(a)
    if name == "clamped_silu":
        assert up is not None
        gate = gate.clamp(max=a["limit"])
        up = up.clamp(min=-a["limit"], max=a["limit"])
        return (up + 1) * (gate * torch.sigmoid(gate * a["alpha"]))
    h = _activated(name, gate)
    return h if up is None else h * up


def _name(a: Mapping[str, Any]) -> str:
    activation = a["activation"]
    return activation if isinstance(activation, str) else _ACTIVATIONS[activation]


def _activated(name: str, gate: Tensor) -> Tensor:
    if name == "silu":
        return F.silu(gate)
    if name == "relu":
        return F.relu(gate)
    if name == "relu_squared":
        return torch.square(F.relu(gate))
    return F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")


def _copy(history: Tensor | None) -> Tensor | None:
    return None if history is None else history.clone()


def gradients(a: Mapping[str, Any], dy: Tensor) -> list[Tensor]:
    """Of the products: [M, I] of gate and of up, or one [M, 2 I] where they are merged."""
    gate_out, up_out = a["gate_out"], a["up_out"]
    recipe: int = a["recipe"]
    if a["gate_out_scale"] is not None:
        features: int = a["features"]
        wide = features if a["form"] in (_PLAIN, _SEPARATE) else 2 * features
        gate_out = _decoded(gate_out, a["gate_out_scale"], a, wide)
        up_out = None if up_out is None else _decoded(up_out, a["up_out_scale"], a, features)
    if gate_out is None:  # made again in the operator, too
        x = a["x"].reshape(-1, a["x"].size(-1))
        gate_out, up_out = (
            None if a[name] is None else _product(x, a[name], a[f"{name}_bias"], recipe)
            for name in ("gate", "up")
        )
    dh = _ops._linear_backward.default(
        *(dy, None, None, a["down"], a["down_amax"], a["features"], recipe),
        *(True, False, bool(a["needs"] & _DOWN_BIAS)),
        history=_copy(a["down_history"]),
    )[0]
    gate, up = _gate_and_up(a, gate_out, up_out)
    d_gate, d_up = _unit_backward(a, gate, up, dh)
    if d_up is None:
        return [d_gate]
    if up_out is not None:
        return [d_gate, d_up]
    return [torch.cat((d_up, d_gate) if a["gate_second"] else (d_gate, d_up), -1)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: int) -> Tensor:
    y: Tensor = _ops._linear_forward.default(x, weight, bias, recipe, False, False)[0]
    return y


def _unit_backward(
    a: Mapping[str, Any], gate: Tensor, up: Tensor | None, dh: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What autograd makes of `hidden`."""
    name = _name(a)
    if name == "clamped_silu":
        assert up is not None
        return _clamped_backward(gate, up, dh, a["alpha"], a["limit"])
    d_activated = dh if up is None else dh * up
    d_up = None if up is None else dh * _activated(name, gate)
    if name == "silu":
        d_gate = _aten.silu_backward(d_activated, gate)
    elif name in ("relu", "relu_squared"):
        positive = F.relu(gate)
        if name == "relu_squared":
            d_activated = d_activated * (2 * positive)
        d_gate = _aten.threshold_backward(d_activated, positive, 0)
    else:
        how = "tanh" if name == "gelu_tanh" else "none"
        d_gate = _aten.gelu_backward(d_activated, gate, approximate=how)
    return d_gate, d_up


def _clamped_backward(
    gate: Tensor, up: Tensor, dh: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    g, u = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    sigmoid = torch.sigmoid(g * alpha)
    d_u = dh * (g * sigmoid)
    d_glu = dh * (u + 1)
    d_g = d_glu * sigmoid + _aten.sigmoid_backward(d_glu * g, sigmoid) * alpha
    return torch.where(gate <= limit, d_g, 0.0), torch.where(up.abs() <= limit, d_u, 0.0)
