"""Puts benchmarks/ on the path: its programs import each other as modules. And a CPU that passes
for a GPU, so that a whole benchmark runs on any machine, on tiny shapes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))


class OnCpu(TorchFunctionMode):
    """device="cuda" means the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Event:
    """torch.cuda.Event by the host's clock."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """Also one thread, since the work is tiny."""
    import timing

    for name, value in {
        "Event": Event,
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 2**30,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1024)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with OnCpu():
        yield
    torch.set_num_threads(threads)
