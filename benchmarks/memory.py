"""GPU memory of a variant: its peak, and giving it back."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

GIB = 2**30


def resident() -> int:
    """Bytes allocated now, cuBLAS's workspaces (32 MiB a thread on Hopper) given back first: each
    variant pays for those that it uses, and none for those of the variant before it."""
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def peak(run: Callable[[], object]) -> int:
    """Peak bytes allocated during one call, what was there before included. The call before it
    pays for what is allocated once."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def drop_gradients(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def free() -> None:
    """Gives back what nothing refers to any more, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
