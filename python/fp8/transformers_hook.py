"""Registers the experts implementation `fp8` with transformers, whichever is imported first.

`import fp8` must not import transformers, which takes seconds and may be missing. So where
transformers' registry is not there yet, a finder on sys.meta_path waits for the import of the one
module that has it, lets the other finders find it, and registers once it was executed. The finder
stays: one comparison of strings per import, and a reload, or a second import after a test emptied
sys.modules, registers again. Taking it out would shift the list under another thread's import.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import experts

MODULE = "transformers.integrations.moe"


def install() -> None:
    """Register now if transformers' registry is loaded, and whenever it is loaded later."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before the finder that would load it without us
    register()


def register() -> bool:
    """Register if the registry is loaded; whether it is. Harmless to repeat."""
    if sys.modules.get(MODULE) is None:
        return False
    # Waits if another thread is in the middle of it; within transformers' own import it is half
    # done, and the finder's turn is gone: fp8.convert calls this again.
    interface = getattr(importlib.import_module(MODULE), "ExpertsInterface", None)
    if interface is None:
        return False
    interface.register(experts.NAME, experts.forward)
    return True


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # A finder that asks the others, as this one does, must not be asked by itself.
        if fullname != MODULE or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            return self._find(fullname, path, target)
        finally:
            self._searching.now = False

    def _find(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """The module's own loader, with one step more; it leaves no trace in the module."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source, get_filename and what else there is

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        interface = getattr(module, "ExpertsInterface", None)  # none before transformers 5
        if interface is not None:
            interface.register(experts.NAME, experts.forward)
