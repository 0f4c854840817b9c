"""Where a layer's delayed scales come from: the buffer `amax_history`, see `fp8.ops.make_history`.

A layer has it where its recipe is delayed. It is not persistent: no state_dict has it, and a layer
that has lost it (a weight that was moved past the module, a pickle from before) begins anew.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..ops import make_history

if TYPE_CHECKING:
    from ._linear import Linear

NAME = "amax_history"


def fit(layer: "Linear") -> None:
    """The buffer is there where the recipe is delayed, and nowhere else."""
    if getattr(layer, "weight", None) is None:
        return  # not initialized yet
    if str(layer.recipe).partition(":")[0] != "delayed":  # an unknown one is forward's to refuse
        drop(layer)
    elif layer._buffers.get(NAME) is None:
        renew(layer)


def renew(layer: "Linear") -> Tensor:
    """An empty history on the weight's device, as the layer's buffer."""
    with torch.inference_mode(False):  # a normal tensor, whatever the caller's mode
        history = make_history(layer.weight.device)
    layer._buffers[NAME] = history
    layer._non_persistent_buffers_set.add(NAME)
    return history


def drop(layer: "Linear") -> None:
    layer._buffers.pop(NAME, None)
    layer._non_persistent_buffers_set.discard(NAME)


def of(layer: "Linear", weight: Tensor) -> Tensor | None:
    """That of a layer whose recipe is delayed; made where it is missing, or on another device than
    its weight."""
    history: Any = layer._buffers.get(NAME)
    if history is not None and history.device == weight.device:
        return history  # type: ignore[no-any-return]
    return history if is_compiling() else renew(layer)
