"""Registers the experts implementation `fp8` with transformers, whichever is imported first.

`import fp8` must not import transformers, which takes seconds and may be missing: _import_hook.py
waits for the import of the one module that has transformers' registry.
"""

from types import ModuleType

from . import experts
from ._import_hook import call_if_imported, when_imported

MODULE = "transformers.integrations.moe"


def install() -> None:
    """Register now if transformers' registry is loaded, and whenever it is loaded later."""
    when_imported(MODULE, _register)


def register() -> bool:
    """Register if the registry is loaded; whether it is. Harmless to repeat.

    Within transformers' own import the module is half done, and the finder's turn is gone:
    fp8.convert calls this again.
    """
    return call_if_imported(MODULE)


def _register(module: ModuleType) -> bool:
    interface = getattr(module, "ExpertsInterface", None)
    if interface is None:  # before transformers 5, or within its own import
        return False
    interface.register(experts.NAME, experts.forward)
    return True
