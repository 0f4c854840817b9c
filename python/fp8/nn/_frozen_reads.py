"""Code that takes the weight of an fp8.FrozenLinear for numbers is told that it holds codes.

PEFT's layers multiply, add to and write `base_layer.weight` when they merge, and some do in every
forward. torch refuses most of that with a message that names neither layer nor remedy, and lets
some pass: codes without their scales, in silence. No argument says who reads an attribute, so the
caller's frame does.
"""

import sys
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

_AS_NUMBERS = {"dequantize_module_weight", "forward", "get_base_weight", "merge", "unmerge"}
"""Functions of PEFT that do. Others ask for device, dtype and shape, which they may."""


class GuardedWeight:
    """The attribute `weight`, which nn.Module keeps. Without `__set__`, so that what stands in the
    instance's own dict comes first."""

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        if not is_compiling() and "peft" in sys.modules:
            code, module = sys._getframe(1).f_code, sys._getframe(1).f_globals.get("__name__", "")
            if code.co_name in _AS_NUMBERS and module.startswith("peft."):
                raise NotImplementedError(_message(code.co_qualname, module))
        weight: Tensor = nn.Module.__getattr__(layer, "weight")  # type: ignore[assignment]
        return weight


def _message(function: str, module: str) -> str:
    text = (
        f"fp8.FrozenLinear: {function} of {module} takes the weight for numbers, and it is FP8 "
        "codes. "
    )
    if function.startswith("Linear.") and module.startswith("peft.tuners.lora."):
        return text + (
            "Call fp8.integrations.peft.adopt(model) on the model with adapters, and merge then"
        )
    return text + (
        "Over frozen layers use plain LoRA, with fp8.integrations.peft, or leave these layers out "
        "of fp8.freeze with its filter"
    )
