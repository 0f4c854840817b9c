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
        "is_current_stream_capturing": lambda: False,
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


@pytest.fixture
def run(cpu_as_gpu, monkeypatch, tmp_path):
    """Runs a benchmark's command line; its JSON. fp8.convert would find these layers too small."""
    import peers
    import report
    import runs
    import sections
    import timing

    ours = peers.ours
    monkeypatch.setattr(peers, "ours", lambda recipe, everything, **how: ours(recipe, **how))
    device_times, host_times = timing.device_times, timing.host_times

    def once(variants, repeats, **settings):
        assert repeats >= 1
        return device_times(variants, 1, **settings | {"warmup": 1})

    def host_once(variants, repeats, **settings):
        return host_times(variants, 1, **settings | {"calls": 1, "warmup": 1})

    monkeypatch.setattr(timing, "device_times", once)
    monkeypatch.setattr(timing, "host_times", host_once)

    def call(name: str, program, *arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", [name, "--output", str(tmp_path), *arguments])
        extra = getattr(program, "arguments", peers.autotune_argument)
        assert runs.main(name, name, program.measure, program.table, extra) == 0
        written = runs.read(tmp_path / f"{name}_h100.json")
        assert report.load(tmp_path)  # no field is lacking
        assert sections.everything({f"{name}_h100": written}, tmp_path)
        return written

    return call


@pytest.fixture
def cases(monkeypatch):
    """What bench_model measures in this test."""
    import bench_model
    import models

    monkeypatch.setattr(models, "VOCABULARY", 128)
    chosen: list = []
    monkeypatch.setattr(bench_model, "model_cases", lambda quick: chosen)
    return chosen


@pytest.fixture
def missing(monkeypatch):
    """Makes a package one that cannot be found."""

    import bench_model

    def without(package: str) -> None:
        monkeypatch.setattr(bench_model, "find_spec", lambda name: None if name == package else 1)

    return without


@pytest.fixture
def no_liger(missing):
    missing("liger_kernel")
