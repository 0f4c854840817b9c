"""Hugging Face transformers: hooks of Trainer and from_pretrained, and `fp8` as an experts
implementation of its mixtures of experts.

`ConvertCallback` converts the model of a Trainer, `ConvertConfig` one that from_pretrained loads;
`FrozenConfig` and `frozen_config` make its linear layers `fp8.FrozenLinear`. Naming one of them
imports transformers.

`register()` puts the experts implementation into transformers' registry, so that a model can ask
for it by its name (`fp8.convert` does so too, if the model is one of transformers), and the
quantizers of the two configs, so that a config.json may name them.

    import fp8
    from transformers import AutoModelForCausalLM

    fp8.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="fp8")

`in_fp8` and `recipe_of` say of an experts module whether it runs in FP8, and how.
"""

import importlib
from typing import TYPE_CHECKING

from ._experts import Settings, in_fp8, recipe_of
from ._registration import register

if TYPE_CHECKING:
    from ._callback import ConvertCallback
    from ._frozen_quantizer import FrozenConfig, frozen_config
    from ._quantizer import ConvertConfig

__all__ = [
    "ConvertCallback",
    "ConvertConfig",
    "FrozenConfig",
    "Settings",
    "frozen_config",
    "in_fp8",
    "recipe_of",
    "register",
]

_MODULES = {
    "ConvertCallback": "_callback",
    "ConvertConfig": "_quantizer",
    "FrozenConfig": "_frozen_quantizer",
    "frozen_config": "_frozen_quantizer",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
