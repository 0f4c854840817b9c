"""Registers the experts implementation `fp8` with transformers.

`import fp8` must not import transformers, which takes seconds and may be missing, and must not
change how others are imported. So it registers only where transformers' registry is loaded.
"""

import importlib
import sys
from types import ModuleType

from . import _experts

MODULE = "transformers.integrations.moe"
"""The module of transformers that has its registry."""


def register() -> None:
    """Make `experts_implementation="fp8"` known to transformers, which is imported. Harmless to
    repeat.

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


def register_if_loaded() -> bool:
    """Register if the registry is loaded; whether it is.

    Within transformers' own import the module is half done: fp8.convert calls this again.
    """
    if sys.modules.get(MODULE) is None:
        return False
    # Waits if another thread is in the middle of it.
    return _register(importlib.import_module(MODULE))


def _register(module: ModuleType) -> bool:
    interface = getattr(module, "ExpertsInterface", None)
    if interface is None:  # before transformers 5, or within its own import
        return False
    interface.register(_experts.NAME, _experts.forward)
    return True
