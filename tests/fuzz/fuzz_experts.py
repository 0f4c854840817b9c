"""experts_frozen, forward and backward: moe_experts' reference with codes and scales that are
given, and the gradients of those codes."""

from __future__ import annotations

import contextlib

import error_bounds
import reference
import torch
from case_fields import Case, Choice, Extent, Family, Seed
from case_tensors import DENSE, DTYPES, KINDS, LAYOUTS, laid_out, tensor
from error_bounds import Approx, Operand, exact, product, rounded, times, total
from fuzz_grouped import Ways
from fuzz_moe import ACTIVATIONS, Expert, _index
from fuzz_moe import Reference as MoeReference
from fuzz_quantize import MODES, mode
from gate_bounds import Gating
from reference import E4M3, assert_same_bits
from torch import Tensor

OPS = torch.ops.fp8
NAMES = {"x": "x", "r": "top_k_weights", "a": "gate_up_bias", "b": "down_bias"}
# What of a weight shares a scale, and the recipe of the rest.
FORMS = {"expert": "rowwise", "rows": "rowwise", "squares": "blockwise"}


def _stack(case: Case, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Codes and scales: quantized values, or any codes with any scales."""
    made = []
    for matrix in tensor(case["w_kind"], "contiguous", shape, torch.float32, seed, "cpu"):
        if case["form"] == "expert":
            codes, scale = reference.quantize_tensorwise(matrix, E4M3)
        elif case["form"] == "rows":
            codes, scale = reference.quantize_rowwise(matrix, E4M3)
        else:
            codes, scale = reference.quantize_blocks(matrix, E4M3, 128)
        if case["codes"] == "any":
            codes = torch.randint(0x78, codes.shape, dtype=torch.uint8)
            scale = torch.rand(scale.shape) * 2.0 ** torch.randint(-12, 0, scale.shape)
        made.append((codes, scale))
    data = reference.from_codes(torch.stack([codes for codes, _ in made]), E4M3)
    return data, torch.stack([scale for _, scale in made])


class Reference(MoeReference):
    """Tensors on the CPU, as the operator casts them."""

    def __init__(self, case: Case, cast: dict[str, Tensor | None], dtype, device: str) -> None:
        self.cast, self.dtype, self.form = cast, dtype, case["form"]
        self.ways = Ways.of(FORMS[self.form], dtype, device)
        self.gating = Gating(case["activation"], case["interleaved"], case["alpha"], case["limit"])
        self.x = exact(cast["x"])
        self.weights = exact(cast["top_k_weights"].float())
        index = cast["index"]
        self.experts = [
            self._forward(e, *torch.where(index == e)) for e in range(cast["down"].shape[0])
        ]

    def _scale(self, name: str, e: int) -> Tensor:
        scale = self.cast[f"{name}_scale"][e]
        return scale.reshape(()) if self.form == "expert" else scale

    def _operand(self, name: str, e: int) -> Operand:
        return error_bounds.operand(self.cast[name][e], self._scale(name, e))

    def _forward(self, e: int, token: Tensor, choice: Tensor) -> Expert:
        def by(a: Approx, name: str) -> Approx:
            made = product(self.ways.quantized(a), self._operand(name, e), self.ways.fprop)
            made = self.ways.stored(made)
            bias = self.cast[f"{name}_bias"]
            return made if bias is None else error_bounds.plus(made, exact(bias[e]))

        gate, up = self.gating.halves(by(self.x.rows(token), "gate_up"))
        h = rounded(self.gating.unit(gate, up)[0], self.dtype)
        return Expert(token, choice, gate, up, h, by(h, "down"))

    def _through(self, rows: Approx, name: str, e: int) -> Approx:
        """rows · weight: times the scales of rows first, where there are some."""
        codes, scale = self.cast[name][e], self._scale(name, e)
        if self.form == "rows":
            wide = torch.float32 if self.dtype == torch.float16 else self.dtype
            rows = rounded(times(rows, exact(scale.reshape(1, -1))), wide)
            scale = torch.ones(())
        weight = error_bounds.operand(codes, scale)
        value = weight.value.t()
        each = weight.scale.amax().expand(value.shape[0], 1)
        turned = Operand(value, torch.zeros_like(value), each, weight.largest_code)
        return self.ways.stored(product(self.ways.quantized(rows), turned, self.ways.dgrad))

    def gradients(self, dy: Tensor) -> dict[str, Approx]:
        self.dy = exact(dy)
        parts = [self._backward(number, e) for number, e in enumerate(self.experts)]
        every = {name: [part[name] for part in parts] for name in parts[0]}
        made = {
            name: Approx(*(torch.stack(t) for t in zip(*every[name], strict=True)))
            for name in ("gate_up_bias", "down_bias")
        }
        made["x"] = self._by_token(every["x"])
        value = torch.zeros_like(self.weights.value)
        error = torch.zeros_like(value)
        for expert, part in zip(self.experts, every["top_k_weights"], strict=True):
            value[expert.token, expert.choice], error[expert.token, expert.choice] = part
        made["top_k_weights"] = error_bounds.approx(value, error)
        return made

    def _backward(self, number: int, expert: Expert) -> dict[str, Approx]:
        dy, weight = self.dy.rows(expert.token), self.weight_of(expert)
        dh = self._through(dy, "down", number)
        _, d_gate, d_up = self.gating.unit(expert.gate, expert.up)
        weighted_dh = times(weight, dh)
        d = self.gating.joined(
            *(rounded(times(weighted_dh, slope), self.dtype) for slope in (d_gate, d_up))
        )
        return {
            "x": self._through(d, "gate_up", number),
            "top_k_weights": self._weights_gradient(number, expert, dh),
            "gate_up_bias": rounded(total(d), self.dtype),
            "down_bias": rounded(total(times(weight, dy)), self.dtype),
        }


def _tensors(case: Case, device: str) -> dict[str, Tensor | None]:
    dtype, data = DTYPES[case["dtype"]], case["data"]
    hidden, features, experts = case["hidden"], case["features"], case["experts"]
    x = tensor(case["x_kind"], case["x_layout"], (case["tokens"], hidden), dtype, data, device)
    made: dict[str, Tensor | None] = {"x": x}
    shapes = {"gate_up": (experts, 2 * features, hidden), "down": (experts, hidden, features)}
    for i, (name, shape) in enumerate(shapes.items()):
        codes, scale = _stack(case, shape, data + 1 + i)
        made[name] = laid_out(codes.to(device), case["w_layout"])
        made[f"{name}_scale"] = laid_out(scale.to(device), case["scale_layout"])
        wanted = case["bias"] in ("both", f"{name}_bias")
        bias = tensor(case["b_kind"], case["b_layout"], shape[:2], dtype, data + 3 + i, device)
        made[f"{name}_bias"] = bias if wanted else None
    index = _index(case)
    weights = torch.rand(index.shape).to(DTYPES[case["weights_dtype"]]).to(device)
    made["top_k_weights"] = laid_out(weights, case["r_layout"])
    for letter, name in NAMES.items():
        if made[name] is not None:
            made[name] = made[name].detach().requires_grad_(letter in case["wants"])
    made["index"] = laid_out(index.to(device), case["r_layout"])
    return made


ARGUMENTS = ("x", "index", "top_k_weights", "gate_up", "gate_up_scale", "down", "down_scale")
ARGUMENTS += ("gate_up_bias", "down_bias")


def check_experts(case: Case, device: str) -> None:
    autocast = case["autocast"] and DTYPES[case["autocast"]]
    dtype = autocast or DTYPES[case["dtype"]]
    options = (case["activation"], case["interleaved"], case["alpha"], case["limit"])
    how = {"input_granularity": FORMS[case["form"]]}
    context = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    with mode(case["mode"]):
        made = _tensors(case, device)
        with context:
            y = OPS.experts_frozen(*(made[name] for name in ARGUMENTS), *options, **how)
        cast = {n: None if t is None else t.detach().cpu() for n, t in made.items()}
        for name in ("x", "gate_up_bias", "down_bias"):
            cast[name] = None if cast[name] is None else cast[name].to(dtype)
        expected = Reference(case, cast, dtype, device)
        what = f"{case['activation']}, {case['form']}"
        assert y.dtype == dtype, f"experts_frozen y dtype: {y.dtype}"
        error_bounds.check(y.detach(), expected.y(), f"experts_frozen y, {what}")
        with torch.no_grad(), context:
            again = OPS.experts_frozen(*(made[name] for name in ARGUMENTS), *options, **how)
        assert_same_bits(again, y.detach(), "experts_frozen repeated")
        if not y.requires_grad:
            return
        leaves = {n: t for n, t in made.items() if t is not None and t.requires_grad}
        dy = tensor(case["dy_kind"], case["dy_layout"], tuple(y.shape), dtype, 7, device)
        found = torch.autograd.grad(y, list(leaves.values()), dy.detach())
        wanted = expected.gradients(dy)
        for (name, leaf), actual in zip(leaves.items(), found, strict=True):
            assert actual.dtype == leaf.dtype, f"experts_frozen d {name} dtype: {actual.dtype}"
            bound = rounded(wanted[name], leaf.dtype)
            error_bounds.check(actual, bound, f"experts_frozen gradient of {name}, {what}")


EXPERTS = Family(
    "experts",
    {
        "form": Choice(*FORMS),
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
        "codes": Choice("quantized", "any"),
        "dtype": Choice(*DTYPES),
        "weights_dtype": Choice(*DTYPES),
        "x_kind": Choice(*KINDS, plain=0.2),
        "w_kind": Choice("normal", *KINDS, plain=0.5),
        "b_kind": Choice(*KINDS, plain=0.5),
        # Not at the end of float32: docs/guarantees.md, "Not promised"
        "dy_kind": Choice(*(kind for kind in KINDS if kind not in ("huge", "extreme")), plain=0.3),
        "x_layout": Choice(*LAYOUTS, plain=0.3),
        "w_layout": Choice(*DENSE, plain=0.3),
        "scale_layout": Choice(*DENSE, plain=0.5),
        "b_layout": Choice(*LAYOUTS, plain=0.3),
        "r_layout": Choice(*DENSE, plain=0.3),
        "dy_layout": Choice(*LAYOUTS, plain=0.3),
        "wants": Choice("", *NAMES, "xr", "xrab"),
        "autocast": Choice(None, "bfloat16", "float16", plain=0.6),
        "mode": Choice(*MODES, plain=0.7),
        "data": Seed(),
    },
    check_experts,
)
