"""What `make soak` trains: a small layer for each recipe, and what it is compared with in bf16.

All learn the same noisy teacher. A step is one batch, whose rows change from step to step; now and
then it is an accumulation of two batches inside fp8.cached_weights, or an evaluation besides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

import fp8

FEATURES, HIDDEN, EXPERTS, TOP_K = 64, 64, 4, 2
# Rows of the batches, in turns: one cycle. Odd ones, one row, and multiples of 16.
ROWS = (64, 17, 128, 1, 48, 33, 96, 80)
NOISE = 0.3  # of the targets: the loss ends near its square, for FP8 as for bf16


class Experts(nn.Module):
    """A mixture: `experts(x, index, weights, gate_up, down)` computes it."""

    def __init__(self, experts: Callable[..., Tensor], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = experts
        options = {"device": device, "dtype": dtype}
        self.router = nn.Linear(FEATURES, EXPERTS, bias=False, **options)
        for name, shape in (
            ("gate_up", (EXPERTS, 2 * HIDDEN, FEATURES)),
            ("down", (EXPERTS, FEATURES, HIDDEN)),
        ):
            drawn = torch.randn(shape, **options) / shape[-1] ** 0.5
            setattr(self, name, nn.Parameter(drawn))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).float().softmax(-1).topk(TOP_K)
        return self.experts(x, index, weights, self.gate_up, self.down)


class Grouped(nn.Module):
    """A layer for two groups that share the rows: fp8.GroupedLinear, or two of nn.Linear."""

    def __init__(self, recipe: str | None, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        if recipe is None:
            self.both = nn.ModuleList(nn.Linear(FEATURES, FEATURES, **options) for _ in range(2))
        else:
            self.layer = fp8.GroupedLinear(2, FEATURES, FEATURES, **options, recipe=recipe)
        self.recipe = recipe
        ends = {rows: [rows // 3, rows] for rows in ROWS}
        self.offsets = {
            rows: torch.tensor(e, dtype=torch.int32, device=device) for rows, e in ends.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        if self.recipe is not None:
            return self.layer(x, self.offsets[x.shape[0]])
        split = x.shape[0] // 3
        return torch.cat([self.both[0](x[:split]), self.both[1](x[split:])])


def experts_in_bf16(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Every expert on every token, weighted: zero where it was not chosen."""
    share = torch.zeros(x.shape[0], EXPERTS, device=x.device).scatter(1, index, weights)
    gate, up = torch.matmul(x, gate_up.transpose(1, 2)).chunk(2, -1)  # [E, T, I] each
    out = torch.matmul(nn.functional.silu(gate) * up, down.transpose(1, 2))
    return (out.float() * share.t()[:, :, None]).sum(0).to(x.dtype)


class Trainee:
    """A model with its optimizer. `peer`: the bf16 trainee whose loss it is compared with."""

    def __init__(self, name: str, peer: str, model: nn.Module) -> None:
        self.name, self.peer, self.model = name, peer, model
        # Experts, bf16's too, go astray with the plain one when a batch has one row.
        self.optimizer = (
            torch.optim.Adam(model.parameters(), lr=0.002, betas=(0.9, 0.99))
            if isinstance(model, Experts)
            else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        )

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One update from the gradients of all batches. The last one's loss, on its device."""
        self.optimizer.zero_grad()
        cached = fp8.cached_weights(self.model) if len(batches) > 1 else nullcontext()
        with cached:
            for x, target in batches:
                loss = nn.functional.mse_loss(self.model(x).float(), target)
                loss.backward()
        self._move_main_grads()
        self.optimizer.step()
        return loss.detach()

    def _move_main_grads(self) -> None:
        for parameter in self.model.parameters():
            buffer = getattr(parameter, "main_grad", None)
            if buffer is not None:
                parameter.grad = buffer.to(parameter.dtype)
                buffer.zero_()


def make(device: str, dtype: torch.dtype, seed: int) -> list[Trainee]:
    """bf16 ones first. Each starts from the same random numbers, whatever stands before it."""
    options = {"device": device, "dtype": dtype}

    def made(name: str, peer: str, build: Callable[..., nn.Module], *arguments: object) -> Trainee:
        torch.manual_seed(seed)
        return Trainee(name, peer, build(*arguments))

    def linear(recipe: str) -> nn.Module:
        # Without a bias every tensor of `delayed` has a history.
        return fp8.Linear(FEATURES, FEATURES, recipe != "delayed", **options, recipe=recipe)

    def into_main_grad() -> nn.Module:
        layer = linear("tensorwise")
        layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)
        return layer

    def static() -> nn.Module:
        layer = linear("tensorwise")
        layer.input_scale = torch.tensor(5.0 / 448, device=device)
        return layer

    def experts(recipe: str | None) -> nn.Module:
        run = partial(torch.ops.fp8.moe_experts, recipe=recipe) if recipe else experts_in_bf16
        return Experts(run, device, dtype)

    recipes = [*fp8.RECIPES, "rowwise:power_of_two"]
    return [
        made("bf16", "bf16", lambda: nn.Linear(FEATURES, FEATURES, **options)),
        made("bf16 grouped", "bf16 grouped", Grouped, None, device, dtype),
        made("bf16 experts", "bf16 experts", experts, None),
        *(made(recipe, "bf16", linear, recipe) for recipe in recipes),
        made("main_grad", "bf16", into_main_grad),
        made("static scale", "bf16", static),
        made("grouped", "bf16 grouped", Grouped, "rowwise", device, dtype),
        *(made(f"experts {r}", "bf16 experts", experts, r) for r in fp8.GROUPED_RECIPES),
    ]


class Teacher:
    """Batches by the number of the step, the same for every trainee."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.random = torch.Generator(device).manual_seed(seed)
        self.weight = self._normal(FEATURES, FEATURES) / 8

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.random)

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """x in dtype, targets in fp32."""
        x = self._normal(rows, FEATURES).to(self.dtype)
        return x, x.float() @ self.weight + NOISE * self._normal(rows, FEATURES)
