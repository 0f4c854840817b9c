"""`fp8.cached_weights`: quantize each weight once while it does not change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..integrations.transformers import _experts
from ..nn._grouped import GroupedLinear
from ..nn._linear import Linear
from ..nn._watched import watched


@contextmanager
def cached_weights(model: nn.Module, *, captures: bool = False) -> Iterator[None]:
    """Inside the context, each `fp8.Linear` of `model` quantizes its weight once, not once a call.

    So do `fp8.GroupedLinear` and the experts modules that run in FP8.

    For gradient accumulation (around the micro-batches between two optimizer steps) and for
    inference. The weights should not change inside. A change is noticed, and the weight quantized
    again,

    - where PyTorch counts it: in-place operators, `load_state_dict`, another tensor in `p.data`;
    - after every step of a `torch.optim.Optimizer`, those included whose fused kernels count
      nothing;
    - after `p.data` was read, through which it may be written (PEFT's merging of adapters,
      averages of weights that are copied in).

    Not noticed is a write through the `.data` of a view or of a detached tensor (`p[0].data`,
    `state_dict()["weight"].data`; without `.data` it is), or through an alias that was made
    earlier, by a collective, by NumPy; nor an operator of a fused optimizer called by itself.

    Memory: one byte per weight element while the context is open, two when a backward is to
    follow (the transposed copy). All of it is freed at the end. Contexts may nest. Where autocast
    casts the weights, the cast copies are what is quantized, and nothing is cached. While it is
    open, the class of the parameters is a subclass of nn.Parameter.

    A CUDA graph that is captured inside quantizes weights in each replay, as its own weights may
    change meanwhile, and a warning says so once; `fp8.freeze` makes layers whose weights are codes.
    With captures=True the graph reads the codes that calls before the capture have made, and
    weights without any it quantizes still, so call the model once inside the context, then
    capture. Replays take no notice of the weights then, inside the context or after it: they read
    what the last call outside of a capture has made, in any such context, on a stream that the
    replay has waited for. A bias has no codes: replays read it as it is. So after a change make a
    call, before the next replay; the graph need not be captured again. The codes stay in memory as
    long as the parameters. For inference: a captured training step would train on codes that do
    not change.

    Args:
        model: any module; those in it that compute in FP8.
        captures: let CUDA graphs read codes that were made before their capture.

    Raises TypeError if `model` is not an nn.Module, or `captures` no bool.

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
    if not isinstance(captures, bool):
        raise TypeError(
            f"fp8.cached_weights: expected captures True or False, got {captures!r:.80}"
        )
    weights: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Linear | GroupedLinear):
            weights.append(module.weight)
        elif _experts.in_fp8(module) and _experts.refused(module) is None:
            weights += _experts.weights_of(module)[::2]
    torch.ops.fp8._cache_weights(weights, captures)
    # Fused optimizers (AdamW(fused=True)) change weights and no version counter. Before the step,
    # too: one that raises half way calls no hook after it.
    hooks = [
        register_optimizer_step_pre_hook(_forget_weights),
        register_optimizer_step_post_hook(_forget_weights),
    ]
    try:
        with watched(weights):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.ops.fp8._uncache_weights(weights, captures)


def _forget_weights(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    torch.ops.fp8._forget_weights([])
