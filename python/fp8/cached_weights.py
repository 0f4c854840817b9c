"""`fp8.cached_weights`: quantize each weight once while it does not change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import experts
from .grouped import GroupedLinear
from .linear import Linear


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Inside the context, each `fp8.Linear` of `model` quantizes its weight once, not once a call.

    So do `fp8.GroupedLinear` and the experts modules that run in FP8.

    For gradient accumulation (around the micro-batches between two optimizer steps) and for
    inference. The weights must not change inside: an update that PyTorch counts (in-place
    operators, optimizers) is noticed and the weight quantized again, one that it does not count
    (`p.data.copy_()`, an all-gather into the same memory) is not.

    Memory: one byte per weight element while the context is open, two when a backward is to
    follow (the transposed copy). All of it is freed at the end. Contexts may nest. Where autocast
    casts the weights, the cast copies are what is quantized, and nothing is cached.

    Raises TypeError if `model` is not an nn.Module.

    Example:
        >>> with fp8.cached_weights(model):
        ...     for batch in micro_batches:
        ...         loss(model(batch)).backward()
        >>> optimizer.step()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fp8.cached_weights: expected an nn.Module, got {type(model).__name__}: {model!r:.80}"
        )
    weights = []
    for module in model.modules():
        if isinstance(module, Linear | GroupedLinear):
            weights.append(module.weight)
        elif experts.in_fp8(module) and experts.refused(module) is None:
            weights += experts.weights_of(module)[::2]
    torch.ops.fp8._cache_weights(weights)
    try:
        yield
    finally:
        torch.ops.fp8._uncache_weights(weights)
