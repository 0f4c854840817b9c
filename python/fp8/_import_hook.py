"""Runs a function once a module is imported, by whoever imports it; imports nothing itself.

For what this library adds to modules that take long to import, or may be missing. Where the module
is not there yet, a finder on sys.meta_path waits for its import, lets the other finders find it,
and calls the function once it was executed. The finder stays: one look into a dict per import, and
a reload, or a second import after a test emptied sys.modules, calls again. Taking it out would
shift the list under another thread's import.
"""

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_callbacks: dict[str, Callable[[ModuleType], bool]] = {}


def when_imported(name: str, callback: Callable[[ModuleType], bool]) -> bool:
    """Call callback(module) now if the module `name` is imported, and after each later import.

    A module has one callback. Returns what it returned; False where the module is not there yet.
    """
    _callbacks[name] = callback
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before the finder that would load it without us
    return call_if_imported(name)


def call_if_imported(name: str) -> bool:
    """What the callback of `name` returns if the module is imported, else False."""
    if sys.modules.get(name) is None:
        return False
    # Waits if another thread is in the middle of it.
    return _callbacks[name](importlib.import_module(name))


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # A finder that asks the others, as this one does, must not be asked by itself.
        if fullname not in _callbacks or getattr(self._searching, "now", False):
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
        _callbacks[module.__name__](module)
