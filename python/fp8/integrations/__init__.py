"""What other packages ask for: a few lines each, and docs/integrations.md has a section each.

    transformers  Trainer's callback, from_pretrained's quantization_config, experts of mixtures
    lightning     precision plugins of Trainer and Fabric
    torchtitan    an override of its Linear
    axolotl       a plugin
    megatron      its parallel linears, for a spec
    peft          LoRA over frozen layers

`import fp8` imports none of these packages. A module here imports its package when it is imported
itself, or first named as an attribute, and raises ImportError, naming the package, if it is not
there. accelerate, DeepSpeed, and PEFT over layers that are not frozen, need nothing of ours.
"""

import importlib
from types import ModuleType

from . import transformers as transformers

_LATER = frozenset({"axolotl", "lightning", "megatron", "peft", "torchtitan"})


def __getattr__(name: str) -> ModuleType:
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
