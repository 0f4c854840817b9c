"""Which kernels a step runs and what they do: from torch.profiler's trace, by the kernel's name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

CLASSES = ("gemm", "quantize", "attention", "other")

# The first class with a needle in the kernel's name, in lower case, has it. Attention comes before
# the products because FlashAttention's names hold types of CUTLASS.
_NEEDLES = {
    "quantize": ("fp8::core", "fp84core"),  # also as mangled
    # cuDNN's name holds sdpa; cudnn::fusion are the small kernels around its backward.
    "attention": ("flash", "fmha", "sdpa", "cudnn::fusion"),
    "gemm": ("gemm", "gemv", "nvjet", "sm90_xmma", "splitk", "cublas"),
}

# Kinds of a whole training step's kernels. rest: norms, RoPE, activations, casts, sums, sorts.
KINDS = ("products", "attention", "fp8", "optimizer", "rest")
_KIND_OF_CLASS = {"gemm": "products", "quantize": "fp8", "attention": "attention", "other": "rest"}


class Kernel(NamedTuple):
    name: str
    us: float
    is_kernel: bool = True  # else a copy or a fill by the driver
    start: float = 0.0  # us, since some moment

    @property
    def end(self) -> float:
        return self.start + self.us


def classify(name: str) -> str:
    """One of CLASSES, for a kernel's demangled name as the profiler shows it."""
    lower = name.lower()
    for group, needles in _NEEDLES.items():
        if any(needle in lower for needle in needles):
            return group
    return "other"


def kind(name: str) -> str:
    """One of KINDS. Inductor names its elementwise kernels after what is around them
    (triton_poi_fused_mm_...), but those of its templates, which are products."""
    lower = name.lower()
    if lower.startswith("triton_tem"):
        return "products"
    if lower.startswith("triton_"):
        return "rest"
    if "adam" in lower:
        return "optimizer"
    return _KIND_OF_CLASS[classify(name)]


def parse(trace: dict) -> list[Kernel]:
    """GPU work in a trace in Chrome's format, in its order: kernels, copies and fills."""
    categories = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [
        Kernel(event["name"], float(event["dur"]), event["cat"] == "kernel", float(event["ts"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in categories
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def per_step(
    kernels: list[Kernel],
    steps: int,
    groups: tuple[str, ...] = CLASSES,
    group: Callable[[str], str] = classify,
) -> dict[str, float]:
    """us of each class in one of `steps` equal steps, and `kernels`, their number. Raises
    RuntimeError if there are none. groups, group: KINDS and `kind`, for those."""
    if not kernels:
        raise RuntimeError("the profiler saw no kernel: is CUPTI allowed to trace on this machine?")
    found = dict.fromkeys((f"{name}_us" for name in groups), 0.0)
    for kernel in kernels:
        found[f"{group(kernel.name)}_us"] += kernel.us / steps
    found["kernels"] = round(sum(kernel.is_kernel for kernel in kernels) / steps)
    return found


def profile(step: Callable[[], object], steps: int) -> list[Kernel]:
    """GPU work of `steps` calls, which must have been warmed up."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return parse(json.loads(path.read_text()))
