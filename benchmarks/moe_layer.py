"""Experts of one layer as transformers has them, in several implementations of one set of weights;
exact results to compare with; and the grouped matmuls alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from peers import Peers, reason
from runs import import_fp8
from shapes import MoeShape
from torch import Tensor, nn

BF16 = torch.bfloat16
CHECKED = 256  # tokens that are compared with exact results


class Data(NamedTuple):
    x: Tensor  # [tokens, hidden] bf16, wants a gradient
    index: Tensor  # [tokens, top_k] int64
    weights: Tensor  # [tokens, top_k], wants a gradient
    dy: Tensor  # [tokens, hidden] bf16

    def first(self, tokens: int) -> Data:
        x, weights = (t.detach()[:tokens].clone().requires_grad_() for t in (self.x, self.weights))
        return Data(x, self.index[:tokens].clone(), weights, self.dy[:tokens].clone())


def make_data(shape: MoeShape) -> Data:
    """Balanced routing up to chance, as a trained router's."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=BF16)

    scores = torch.rand(shape.tokens, shape.experts, device="cuda")
    top, index = scores.topk(shape.top_k, dim=-1)
    weights = (top / top.sum(-1, keepdim=True)).to(BF16)
    size = (shape.tokens, shape.hidden)
    return Data(normal(*size).requires_grad_(), index, weights.requires_grad_(), normal(*size))


def make_experts(shape: MoeShape) -> nn.Module:
    """transformers' own module, running `grouped_mm`."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_local_experts=shape.experts
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config).to(BF16)
    module = module.to_empty(device="cuda")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def ours(module: nn.Module, recipe: str) -> nn.Module:
    """The same parameters in FP8."""
    fp8 = import_fp8()
    made = copy.copy(module)  # shares them
    fp8.convert(made, filter=lambda module, name: True, experts_recipe=recipe)
    return made


class Composed(nn.Module):
    """Two grouped_linear and the module's own gating: what experts run whose gating no operator
    has."""

    def __init__(self, module: nn.Module, recipe: str) -> None:
        super().__init__()
        self.inner = module
        self.recipe = recipe

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        from fp8.integrations.transformers import _experts

        up, up_bias, down, down_bias = _experts.weights_of(self.inner)
        gate = self.inner._apply_gate
        return _experts.mixture(
            x, index, weights, up, down, up_bias, down_bias, gate, self.recipe
        ).to(x.dtype)


class Torchao(nn.Module):
    """transformers' passes around torchao's differentiable FP8 grouped matmul (a prototype)."""

    def __init__(self, module: nn.Module) -> None:
        from torchao.prototype.moe_training.fp8_grouped_mm import (
            _to_fp8_rowwise_then_scaled_grouped_mm as grouped_mm,
        )

        # Without it groups that are no multiples of 16 stop the GPU with an assertion.
        if "pad_token_groups_for_grouped_mm" not in inspect.signature(grouped_mm).parameters:
            raise ImportError("this version does not pad groups of tokens")
        super().__init__()
        self.inner = module
        self._grouped_mm = lambda x, weight, offs: grouped_mm(x, weight, offs)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        from transformers.integrations import moe

        with mock.patch.object(moe, "_grouped_mm", self._grouped_mm):
            return moe.grouped_mm_experts_forward(self.inner, x, index, weights)


def variants(module: nn.Module, recipes: tuple[str, ...], peers: bool) -> tuple[dict, Peers]:
    """Modules by name, bf16 first, and what was left out."""
    made: dict[str, nn.Module] = {"bf16": module}
    for recipe in recipes:
        made[f"fp8 {recipe}"] = ours(module, recipe)
    made[f"fp8 {recipes[0]}, composed"] = Composed(module, recipes[0])
    left_out = Peers()
    if peers:
        try:
            made["torchao rowwise eager"] = Torchao(module)
        except Exception as error:
            left_out.skipped["torchao"] = reason(error)
    return made, left_out


def calls(module: nn.Module, data: Data) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """Forward without gradients, and the whole step. Gradients are replaced, as by zero_grad."""
    leaves = [data.x, data.weights, *module.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return module(data.x, data.index, data.weights)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(data.x, data.index, data.weights).backward(data.dy)

    return forward, step


def expert(module: nn.Module, number: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One expert in fp32: its output on x, and the weights that it was computed with."""
    up, down = (w[number].detach().float() for w in (module.gate_up_proj, module.down_proj))
    up, down = up.requires_grad_(), down.requires_grad_()
    gate, value = (x @ up.t()).chunk(2, dim=-1)
    return (nn.functional.silu(gate) * value) @ down.t(), up, down


class Exact(NamedTuple):
    """In fp32. y and dx of the first CHECKED tokens, and the first expert's weight gradients."""

    y: Tensor
    dx: Tensor
    d_up: Tensor
    d_down: Tensor


def exact(module: nn.Module, data: Data) -> Exact:
    few = data.first(CHECKED)
    x, y = few.x.detach().float().requires_grad_(), torch.zeros_like(few.dy, dtype=torch.float32)
    dx = torch.zeros_like(y)
    for number in range(module.num_experts):
        token, choice = torch.where(few.index == number)
        if token.numel() == 0:
            continue
        out, _, _ = expert(module, number, x[token])
        out = out * few.weights.detach()[token, choice, None].float()
        y = y.index_add(0, token, out.detach())
        dx += torch.autograd.grad(out, x, few.dy[token].float())[0]
    token, choice = torch.where(data.index == 0)
    out, up, down = expert(module, 0, data.x.detach()[token].float())
    grad = data.dy[token].float() * data.weights.detach()[token, choice, None].float()
    return Exact(y, dx, *torch.autograd.grad(out, (up, down), grad))


def quantized(t: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a matrix, or of each of a stack."""
    data, scale = torch.ops.fp8.quantize_rowwise(t)
    return data, scale.squeeze(-1).contiguous()


def gemms_alone(shape: MoeShape, module: nn.Module, kind: str) -> tuple[Callable, Callable]:
    """Calls of both forward products, and of all six of a step, on operands that exist already.
    Groups are equal, and begin at multiples of 16. kind: "bf16", "split" or "fast", which is how
    FP8's gradients accumulate."""
    each = shape.rows // shape.experts // 16 * 16
    ends = torch.arange(1, shape.experts + 1, device="cuda", dtype=torch.int32) * each
    rows = each * shape.experts
    forward, backward = [], []
    for weight in (module.gate_up_proj.detach(), module.down_proj.detach()):
        _, n, k = weight.shape
        x, dy = (torch.randn(rows, cols, device="cuda", dtype=BF16) for cols in (k, n))
        if kind == "bf16":
            forward.append(bf16_product(x, weight.transpose(1, 2), ends))
            backward.append(bf16_product(dy, weight, ends))
            backward.append(bf16_product(dy.t(), x, ends))
            continue
        fast = kind == "fast"
        forward.append(fp8_product(quantized(x), quantized(weight), ends, True))
        weight_t = quantized(weight.transpose(1, 2).contiguous())
        backward.append(fp8_product(quantized(dy), weight_t, ends, fast))
        columns = [quantized(t.view(shape.experts, each, -1).transpose(1, 2)) for t in (dy, x)]
        flat = [
            (data.permute(1, 0, 2).reshape(data.shape[1], rows), scale.reshape(-1))
            for data, scale in columns
        ]
        backward.append(fp8_product(*flat, ends, fast))

    def run_forward() -> None:
        for product in forward:
            product()

    def run_step() -> None:
        for product in (*forward, *backward):
            product()

    return run_forward, run_step


def bf16_product(a: Tensor, b: Tensor, ends: Tensor) -> Callable[[], Tensor]:
    return lambda: torch._grouped_mm(a, b, ends)


def fp8_product(a: tuple, b: tuple, ends: Tensor, fast: bool) -> Callable[[], Tensor]:
    (data_a, scale_a), (data_b, scale_b) = a, b
    return lambda: torch._scaled_grouped_mm(
        data_a,
        data_b.transpose(-2, -1),
        scale_a,
        scale_b,
        ends,
        out_dtype=BF16,
        use_fast_accum=fast,
    )


def cached(module: nn.Module, name: str):
    """fp8.cached_weights for ours, nothing for others."""
    return import_fp8().cached_weights(module) if name.startswith("fp8") else nullcontext()
