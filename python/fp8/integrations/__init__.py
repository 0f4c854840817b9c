"""What other libraries need to find fp8, a module for each.

`import fp8` imports none of these libraries. `fp8.integrations.peft` imports its own when it is
first named, and raises ImportError, naming the package, if it is not there.
"""

import importlib
from types import ModuleType

from . import transformers as transformers

_LATER = frozenset({"peft"})


def __getattr__(name: str) -> ModuleType:
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
