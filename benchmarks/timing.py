"""Timing on a GPU: variants interleaved in one process, cold L2, CUDA events, median and spread;
host time apart from device time.

Absolute times move by percents from run to run and machine to machine; only variants of one run are
compared, on the same data. Before each timed call a buffer larger than the L2 is written, so that
every variant reads its inputs from memory.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

FLUSH_BYTES = 256 * 2**20  # several times the L2 of an H100 (50 MB) or H200 (60 MB)


@dataclass(frozen=True)
class Measurement:
    """Repeated times of one thing, in microseconds."""

    median: float
    low: float  # first decile
    high: float  # ninth decile
    repeats: int

    @property
    def spread(self) -> float:
        """(high - low) / median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


def summarize(times: Iterable[float]) -> Measurement:
    """Median and deciles. Raises ValueError when there are no times."""
    values = sorted(times)
    if not values:
        raise ValueError("no times were measured")
    last = len(values) - 1
    low, high = values[round(0.1 * last)], values[round(0.9 * last)]
    return Measurement(statistics.median(values), low, high, len(values))


class Flush:
    """Evicts the L2 by writing a larger buffer. It also keeps the GPU busy for a while, so that the
    host has queued the timed work before the GPU reaches it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self) -> None:
        self._buffer.zero_()


def _calls_of(
    milliseconds: float, run: Callable[[], object], before: Callable[[], None] | None
) -> int:
    """How many calls last that long; 0 calls are made to find out for 0."""
    if milliseconds == 0:
        return 0
    if before:
        before()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return math.ceil(milliseconds / start.elapsed_time(end))


def device_times(
    variants: dict[str, Callable[[], object]],
    repeats: int = 20,
    warmup: int = 3,
    before: Callable[[], None] | None = None,
    progress: Callable[[], None] | None = None,
    lead: int = 0,
    lead_ms: float = 0.0,
) -> dict[str, Measurement]:
    """Time between two events around each call, cold L2, the variants taking turns.

    What the host is too slow to queue ahead counts too, as it does in a training step. `before`
    runs before each call, untimed (new version counters, fresh gradients).

    `lead` untimed calls of the same variant precede each timed one, as the step before does in
    training. Without them a long call runs at the clocks its neighbour left: a power-limited one
    has heated the GPU, one that waits for the host has let it rest. A call of a few milliseconds or
    less does not undo that alone: `lead_ms` asks for at least so many milliseconds of them. The L2
    is flushed between the untimed and the timed call.
    """
    flush = Flush()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        for _ in range(warmup):
            if before:
                before()
            run()
    leads = {name: max(lead, _calls_of(lead_ms, run, before)) for name, run in variants.items()}
    torch.cuda.synchronize()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, run in variants.items():
                for _ in range(leads[name]):
                    if before:
                        before()
                    run()
                if before:
                    before()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush()
                start.record()
                run()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) * 1e3)
            if progress:
                progress()
    finally:
        gc.enable()
    return {name: summarize(found) for name, found in times.items()}


def in_a_row(run: Callable[[], object], repeats: int, warmup: int = 1) -> Measurement:
    """Time of each of `repeats` calls that are queued one behind the other, as a training loop
    queues its steps: from the end of the call before to its own. For calls of many milliseconds,
    which leave nothing in the L2 for each other; `warmup` calls precede them without a pause."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(warmup):
        run()
    gc.disable()
    try:
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        events[-1].synchronize()
    finally:
        gc.enable()
    return summarize(start.elapsed_time(end) * 1e3 for start, end in pairwise(events))


def host_times(
    variants: dict[str, Callable[[], object]],
    repeats: int = 30,
    calls: int = 20,
    warmup: int = 10,
    before: Callable[[], None] | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, Measurement]:
    """Host time of one call, without waiting for the GPU: the mean of `calls` calls, repeated.

    Use work so small that the GPU keeps up; else the launch queue fills and the host waits.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        for _ in range(warmup):
            run()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, run in variants.items():
                torch.cuda.synchronize()
                elapsed = 0.0
                for _ in range(calls):
                    if before:
                        before()
                    begin = time.perf_counter()
                    run()
                    elapsed += time.perf_counter() - begin
                times[name].append(elapsed / calls * 1e6)
            if progress:
                progress()
    finally:
        gc.enable()
    return {name: summarize(found) for name, found in times.items()}


def graph_of(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A replay of it in a CUDA graph, and where its result lies."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph.replay, y


def sqnr(actual: torch.Tensor, exact: torch.Tensor) -> float | None:
    """Signal to quantization noise in dB, None for equal tensors. Raises ValueError for NaN: the
    time of a wrong result is not worth a row."""
    noise = (actual.double() - exact.double()).norm()
    if bool(noise.isnan()):
        raise ValueError("the result holds NaN")
    return None if noise == 0 else round(float(20 * torch.log10(exact.double().norm() / noise)), 2)


def new_weights(parameters: Iterable[torch.Tensor]) -> Callable[[], None]:
    """What an optimizer step does to version counters, so that nothing of a weight is reused."""
    kept = list(parameters)

    def increment() -> None:
        for parameter in kept:
            torch.autograd.graph.increment_version(parameter)

    return increment


def forward_backward(
    module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """Calls of module(x) and of its whole step. Gradients are replaced, as after zero_grad."""
    leaf = x.detach().requires_grad_()
    parameters = list(module.parameters())

    def forward() -> torch.Tensor:
        return module(leaf)

    def step() -> None:
        leaf.grad = None
        for parameter in parameters:
            parameter.grad = None
        module(leaf).backward(dy)

    return forward, step
