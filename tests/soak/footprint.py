"""What a process holds: memory, handles, plans, tensors; and by how much each may grow.

After the warm-up (caching allocators, thread pools, plans of every shape) a step gives back all
that it took. What is exact must not grow at all. Reserved and resident memory move with
fragmentation: a leak of 4 KiB a step shows in 20,000 steps.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

import fp8

MIB = 2**20
GROWTH = {
    "allocated bytes": 0,  # of the GPU, at the same place of the cycle of shapes
    "reserved bytes": 32 * MIB,
    "resident bytes": 64 * MIB,
    "open files": 0,
    "threads": 0,
    "matmul plans": 0,
    "live tensors": 0,
}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure() -> dict[str, int]:
    """Everything that GROWTH names; GPU memory 0 where there is no GPU."""
    gc.collect()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    return {
        "allocated bytes": torch.cuda.memory_allocated() if gpu else 0,
        "reserved bytes": torch.cuda.memory_reserved() if gpu else 0,
        "resident bytes": _resident(),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "matmul plans": fp8.plan_cache_info()["size"],
        # type, not isinstance: that would ask lazy modules for their __class__
        "live tensors": sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()),
    }


def growth(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """What grew by more than it may, in words."""
    return [
        f"{name} grew by {now[name] - before[name]}, from {before[name]} (allowed: {allowed})"
        for name, allowed in GROWTH.items()
        if now[name] - before[name] > allowed
    ]
