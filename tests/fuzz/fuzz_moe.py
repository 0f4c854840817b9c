"""moe_experts, forward and backward: each expert in fp64, with the error of every quantization and
rounding on the way carried along."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import error_bounds
import torch
from case_fields import Case, Choice, Extent, Family, Seed
from case_tensors import DENSE, DTYPES, KINDS, LAYOUTS, laid_out, tensor
from error_bounds import Approx, approx, exact, rounded, times, total
from fuzz_grouped import RECIPES, Ways, columns, rows_by_weight
from fuzz_quantize import MODES, mode
from gate_bounds import Gating
from reference import assert_same_bits
from torch import Tensor

OPS = torch.ops.fp8
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_silu")
# The letters of `wants`.
NAMES = {
    "x": "x",
    "r": "top_k_weights",
    "g": "gate_up",
    "d": "down",
    "a": "gate_up_bias",
    "b": "down_bias",
}


class Expert(NamedTuple):
    """One expert's part of the forward, and where its rows come from."""

    token: Tensor
    choice: Tensor
    gate: Approx
    up: Approx
    h: Approx
    out: Approx  # with its bias, not weighted


class Reference:
    """Tensors on the CPU, as the operator casts them."""

    def __init__(self, case: Case, cast: dict[str, Tensor | None], dtype, device: str) -> None:
        self.cast, self.dtype, self.recipe = cast, dtype, case["recipe"]
        self.ways = Ways.of(self.recipe, dtype, device)
        self.gating = Gating(case["activation"], case["interleaved"], case["alpha"], case["limit"])
        self.x, self.gate_up, self.down = (exact(cast[n]) for n in ("x", "gate_up", "down"))
        self.weights = exact(cast["top_k_weights"].float())
        index = cast["index"]
        self.experts = [
            self._forward(e, *torch.where(index == e)) for e in range(cast["down"].shape[0])
        ]

    def _forward(self, e: int, token: Tensor, choice: Tensor) -> Expert:
        g = rows_by_weight(self.x.rows(token), self.gate_up.rows(e), self.ways)
        if self.cast["gate_up_bias"] is not None:
            g = error_bounds.plus(g, exact(self.cast["gate_up_bias"][e]))
        gate, up = self.gating.halves(g)
        h = rounded(self.gating.unit(gate, up)[0], self.dtype)
        out = rows_by_weight(h, self.down.rows(e), self.ways)
        if self.cast["down_bias"] is not None:
            out = error_bounds.plus(out, exact(self.cast["down_bias"][e]))
        return Expert(token, choice, gate, up, h, out)

    def weight_of(self, expert: Expert) -> Approx:
        value = self.weights.value[expert.token, expert.choice, None]
        return Approx(value, torch.zeros_like(value))

    def _by_token(self, parts: list[Approx]) -> Approx:
        """Rows of the experts added up where their tokens are, in fp32, and rounded."""
        value = torch.zeros(self.x.value.shape[0], parts[0].value.shape[1], dtype=torch.float64)
        error, magnitude = torch.zeros_like(value), torch.zeros_like(value)
        for expert, part in zip(self.experts, parts, strict=True):
            value.index_add_(0, expert.token, part.value)
            error.index_add_(0, expert.token, part.error)
            magnitude.index_add_(0, expert.token, part.largest())
        error = error + self.cast["index"].shape[1] * 2.0**-24 * magnitude
        # Some of a token's rows together, too, must be in range.
        error = torch.where(magnitude > 0.99 * torch.finfo(torch.float32).max, math.inf, error)
        return rounded(approx(value, error), self.dtype)

    def y(self) -> Approx:
        return self._by_token([times(self.weight_of(e), e.out) for e in self.experts])

    # --- gradients, by name ---

    def gradients(self, dy: Tensor) -> dict[str, Approx]:
        self.dy = exact(dy)
        parts = [self._backward(number, e) for number, e in enumerate(self.experts)]
        every = {name: [part[name] for part in parts] for name in parts[0]}
        made = {
            name: Approx(*(torch.stack(t) for t in zip(*every[name], strict=True)))
            for name in ("gate_up", "down", "gate_up_bias", "down_bias")
        }
        made["x"] = self._by_token(every["x"])
        value = torch.zeros_like(self.weights.value)
        error = torch.zeros_like(value)
        for expert, part in zip(self.experts, every["top_k_weights"], strict=True):
            value[expert.token, expert.choice], error[expert.token, expert.choice] = part
        made["top_k_weights"] = approx(value, error)
        return made

    def _backward(self, number: int, expert: Expert) -> dict[str, Approx]:
        dy, weight = self.dy.rows(expert.token), self.weight_of(expert)
        down, gate_up = self.down.rows(number), self.gate_up.rows(number)
        dh = rows_by_weight(dy, down.t(), self.ways, backward=True)
        _, d_gate, d_up = self.gating.unit(expert.gate, expert.up)
        weighted_dh = times(weight, dh)
        d = self.gating.joined(
            *(rounded(times(weighted_dh, slope), self.dtype) for slope in (d_gate, d_up))
        )
        weighted_h = rounded(times(weight, expert.h), self.dtype)
        return {
            "x": rows_by_weight(d, gate_up.t(), self.ways, backward=True),
            "top_k_weights": self._weights_gradient(number, expert, dh),
            "gate_up": columns(d, self.x.rows(expert.token), self.recipe, self.ways),
            "down": columns(dy, weighted_h, self.recipe, self.ways),
            "gate_up_bias": rounded(total(d), self.dtype),
            "down_bias": rounded(total(times(weight, dy)), self.dtype),
        }

    def _weights_gradient(self, number: int, expert: Expert, dh: Approx) -> Approx:
        d_weights = total(times(dh, expert.h), 1)
        if self.cast["down_bias"] is None:
            return d_weights
        dy, bias = self.dy.rows(expert.token), exact(self.cast["down_bias"][number])
        of_bias = total(times(dy, bias), 1)
        flushed = 2.0**-126 * (1 + dy.largest().sum(1) + bias.largest().sum())
        of_bias = approx(of_bias.value, of_bias.error + flushed)  # a product of torch's own
        return error_bounds.plus(d_weights, rounded(of_bias, self.dtype))


# --- a case ---


def _index(case: Case) -> Tensor:
    tokens, experts, top_k = case["tokens"], case["experts"], case["top_k"]
    torch.manual_seed(case["data"])
    if case["routing"] == "one":
        return torch.full((tokens, top_k), experts - 1)
    index = torch.randint(experts, (tokens, top_k))
    if case["routing"] == "skewed":
        index = torch.where(torch.rand(tokens, top_k) < 0.9, 0, index)
    if case["routing"] == "sentinels":
        outside = torch.tensor([-1, experts, 10_000])[torch.randint(3, (tokens, top_k))]
        index = torch.where(torch.rand(tokens, top_k) < 0.4, outside, index)
    return index


def _tensors(case: Case, device: str) -> dict[str, Tensor | None]:
    dtype, data = DTYPES[case["dtype"]], case["data"]
    hidden, features, experts = case["hidden"], case["features"], case["experts"]
    x = tensor(case["x_kind"], case["x_layout"], (case["tokens"], hidden), dtype, data, device)
    shapes = {
        "gate_up": (experts, 2 * features, hidden),
        "down": (experts, hidden, features),
        "gate_up_bias": (experts, 2 * features),
        "down_bias": (experts, hidden),
    }
    made: dict[str, Tensor | None] = {"x": x}
    for i, (name, shape) in enumerate(shapes.items()):
        which = "b" if name.endswith("bias") else "w"
        kind, layout = case[f"{which}_kind"], case[f"{which}_layout"]
        made[name] = tensor(kind, layout, shape, dtype, data + 1 + i, device)
    for name in ("gate_up_bias", "down_bias"):
        if case["bias"] not in ("both", name):
            made[name] = None
    index = _index(case)
    weights = torch.rand(index.shape).to(DTYPES[case["weights_dtype"]]).to(device)
    made["top_k_weights"] = laid_out(weights, case["r_layout"])
    for letter, name in NAMES.items():
        if made[name] is not None:
            made[name].requires_grad_(letter in case["wants"])
    made["index"] = laid_out(index.to(device), case["r_layout"])
    return made


def check_moe(case: Case, device: str) -> None:
    autocast = case["autocast"] and DTYPES[case["autocast"]]
    dtype, recipe = autocast or DTYPES[case["dtype"]], case["recipe"]
    options = (case["activation"], case["interleaved"], case["alpha"], case["limit"], recipe)
    context = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    with mode(case["mode"]):
        made = _tensors(case, device)
        names = ("x", "index", "top_k_weights", "gate_up", "down", "gate_up_bias", "down_bias")
        with context:
            y = OPS.moe_experts(*(made[name] for name in names), *options)
        cast = {n: None if t is None else t.detach().cpu() for n, t in made.items()}
        for name in NAMES.values():
            if name != "top_k_weights" and cast[name] is not None:
                cast[name] = cast[name].to(dtype)
        reference = Reference(case, cast, dtype, device)
        what = f"{case['activation']}, {recipe}"
        assert y.dtype == dtype, f"moe_experts y dtype: {y.dtype}"
        error_bounds.check(y.detach(), reference.y(), f"moe_experts y, {what}")
        leaves = {n: t for n, t in made.items() if t is not None and t.requires_grad}
        if not y.requires_grad:
            return
        dy = tensor(case["dy_kind"], case["dy_layout"], tuple(y.shape), dtype, 7, device)
        found = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=case["retain"])
        if case["retain"]:
            for a, b in zip(torch.autograd.grad(y, list(leaves.values()), dy), found, strict=True):
                assert_same_bits(a, b, "moe_experts retain_graph")
        expected = reference.gradients(dy)
        for (name, leaf), actual in zip(leaves.items(), found, strict=True):
            assert actual.dtype == leaf.dtype, f"moe_experts d {name} dtype: {actual.dtype}"
            wanted = rounded(expected[name], leaf.dtype)
            error_bounds.check(actual, wanted, f"moe_experts gradient of {name}, {what}")


MOE = Family(
    "moe",
    {
        "recipe": Choice(*RECIPES),  # no options: results are bounded with other scales only
        "activation": Choice(*ACTIVATIONS),
        "interleaved": Choice(False, True),
        "alpha": Choice(1.702, 1.0),
        "limit": Choice(7.0, 0.5),
        "tokens": Extent(0, 60),
        "hidden": Extent(16, 144, 16),
        "features": Extent(16, 144, 16),
        "experts": Extent(1, 8),
        "top_k": Extent(1, 4),
        "routing": Choice("random", "one", "skewed", "sentinels"),
        "bias": Choice("neither", "gate_up_bias", "down_bias", "both"),
        "dtype": Choice(*DTYPES),
        "weights_dtype": Choice(*DTYPES),
        "x_kind": Choice(*KINDS, plain=0.2),
        "w_kind": Choice("normal", *KINDS, plain=0.5),
        "b_kind": Choice(*KINDS, plain=0.5),
        # Not at the end of float32: docs/guarantees.md, "Not promised"
        "dy_kind": Choice(*(kind for kind in KINDS if kind not in ("huge", "extreme")), plain=0.3),
        "x_layout": Choice(*LAYOUTS, plain=0.3),
        "w_layout": Choice(*DENSE, plain=0.3),
        "b_layout": Choice(*LAYOUTS, plain=0.3),
        "r_layout": Choice(*DENSE, plain=0.3),
        "dy_layout": Choice(*LAYOUTS, plain=0.3),
        "wants": Choice("", *NAMES, "xr", "gd", "xgd", "rab", "xrgd", "xrgdab"),
        "retain": Choice(False, True),
        "autocast": Choice(None, "bfloat16", "float16", plain=0.6),
        "mode": Choice(*MODES, plain=0.7),
        "data": Seed(),
    },
    check_moe,
    share=1.5,
)
