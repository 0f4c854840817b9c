"""Trains several variants of one model side by side and records loss, time and memory of each step.

Each step trains every variant once on the same batch before the next step begins, in an order that
rotates: heat, clock changes and other programs on the machine meet all variants alike. A step is
timed from before its forward pass to the end of its optimizer update, with the device idle at both
ends; CUDA events on a GPU, the wall clock on the CPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, [batch, length] int64


@dataclass(frozen=True)
class Schedule:
    """How every variant is trained: AdamW, linear warm-up, then cosine decay to a tenth."""

    steps: int
    learning_rate: float
    warmup: int = 10
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


@dataclass
class Variant:
    """One way to run the model, with what was recorded while it trained."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # nats per byte, one a step
    milliseconds: list[float] = field(default_factory=list)  # one a step
    peak_bytes: int = 0  # of this variant alone; 0 on the CPU
    resident_bytes: int = 0  # what stays between steps: parameters and optimizer state
    held_out: float = math.nan  # nats per byte, after training

    def median_milliseconds(self) -> float:
        """Median time of a step, without the first tenth (allocation, first calls, tuning)."""
        return statistics.median(self.milliseconds[self.warm_steps() :])

    def warm_steps(self) -> int:
        """Number of first steps that the median leaves out."""
        return min(len(self.milliseconds) - 1, max(3, len(self.milliseconds) // 10))


def make_variant(name: str, model: nn.Module, schedule: Schedule) -> Variant:
    """A variant with its own AdamW (fused on CPU and GPU alike)."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=schedule.weight_decay,
        fused=True,
    )
    resident = sum(parameter.nbytes for parameter in model.parameters())
    return Variant(name, model, optimizer, resident_bytes=resident)


def train(
    variants: Sequence[Variant],
    batch_of: Callable[[int], Batch],
    schedule: Schedule,
    device: torch.device,
    on_step: Callable[[Variant], None],
) -> None:
    """Trains all variants for schedule.steps steps; `on_step` is called after each step of each.

    Raises:
        FloatingPointError: a loss is NaN or infinite.
    """
    clock = _CudaClock() if device.type == "cuda" else _WallClock()
    for step in range(schedule.steps):
        inputs, targets = (tensor.to(device) for tensor in batch_of(step))
        first = step % len(variants)
        for variant in [*variants[first:], *variants[:first]]:
            for group in variant.optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            memory = _MemoryWatch(variant, device)
            clock.start()
            loss = _step(variant, inputs, targets, schedule.clip_norm)
            variant.milliseconds.append(clock.stop())
            variant.losses.append(loss.item())
            del loss
            memory.finish()
            if not math.isfinite(variant.losses[-1]):
                raise FloatingPointError(
                    f"{variant.name}: loss of step {step + 1} is {variant.losses[-1]}"
                )
            on_step(variant)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Mean loss over `batches` in nats per byte."""
    model.eval()
    losses = [_loss(model, x.to(device), y.to(device)).item() for x, y in batches]
    model.train()
    return statistics.fmean(losses)


def _step(
    variant: Variant, inputs: torch.Tensor, targets: torch.Tensor, clip_norm: float
) -> torch.Tensor:
    loss = _loss(variant.model, inputs, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(variant.model.parameters(), clip_norm, foreach=True)
    variant.optimizer.step()
    variant.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(inputs)  # [batch, length, vocabulary]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class _WallClock:
    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> float:
        return (time.perf_counter() - self.began) * 1e3


class _CudaClock:
    def start(self) -> None:
        torch.cuda.synchronize()
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.events[0].record()

    def stop(self) -> float:
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1])


class _MemoryWatch:
    """Peak memory of one variant while the others' parameters lie beside it."""

    def __init__(self, variant: Variant, device: torch.device) -> None:
        self.variant = variant
        self.enabled = device.type == "cuda"
        if self.enabled:
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def finish(self) -> None:
        if not self.enabled:
            return
        others = self.before - self.variant.resident_bytes
        self.variant.resident_bytes += torch.cuda.memory_allocated() - self.before
        peak = torch.cuda.max_memory_allocated() - others
        self.variant.peak_bytes = max(self.variant.peak_bytes, peak)
