"""Registers the experts implementation `fp8` with transformers.

`import fp8` does not: it neither imports transformers, which takes seconds and may be missing, nor
changes it where it is loaded. What asks for it: `register`, `fp8.convert` of a model of
transformers, and a pickle of a converted mixture.
"""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

from torch import nn

from . import _experts

MODULE = "transformers.integrations.moe"
"""The module of transformers that has its registry."""


def register() -> None:
    """Make `experts_implementation="fp8"` known to transformers, which is imported, and the
    quantizers of `ConvertConfig` and `FrozenConfig`. Harmless to repeat.

    Raises ImportError without transformers, or with one that has no experts implementations (before
    transformers 5).

    Example:
        >>> fp8.integrations.transformers.register()
        >>> model.set_experts_implementation("fp8")
    """
    module = importlib.import_module(MODULE)
    if not _register(module):
        raise ImportError(
            f"fp8.integrations.transformers.register: {MODULE} has no ExpertsInterface; "
            "transformers 5 or later is needed"
        )
    if find_spec("transformers.quantizers") is not None:
        for quantizer in ("_quantizer", "_frozen_quantizer"):
            importlib.import_module(f".{quantizer}", __package__)


def register_for(model: nn.Module) -> None:
    """Register if the model is one of transformers, or has one, or has experts of one."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    if any(isinstance(m, kind) or _experts.is_experts(m) for m in model.modules()):
        register_if_loaded()


def register_if_loaded() -> bool:
    """Register if the registry is loaded; whether it is."""
    if sys.modules.get(MODULE) is None:
        return False
    # Waits if another thread is in the middle of it.
    return _register(importlib.import_module(MODULE))


def _register(module: ModuleType) -> bool:
    interface = getattr(module, "ExpertsInterface", None)
    if interface is None:  # before transformers 5
        return False
    interface.register(_experts.NAME, _experts.forward)
    return True
