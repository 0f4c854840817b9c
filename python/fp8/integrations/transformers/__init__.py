"""Hugging Face transformers: hooks of Trainer and from_pretrained, and `fp8` as an experts
implementation of its mixtures of experts.

`ConvertCallback` converts the model of a Trainer, `ConvertConfig` one that from_pretrained loads.
Naming one of them imports transformers.

`register()` puts the implementation into transformers' registry, so that a model can ask for it by
its name; `fp8.convert` does so too, if the model is one of transformers.

    import fp8
    from transformers import AutoModelForCausalLM

    fp8.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="fp8")

`in_fp8` and `recipe_of` say of an experts module whether it runs in FP8, and how.
"""

from typing import TYPE_CHECKING

from ._experts import Settings, in_fp8, recipe_of
from ._registration import register

if TYPE_CHECKING:
    from ._callback import ConvertCallback
    from ._quantizer import ConvertConfig

__all__ = ["ConvertCallback", "ConvertConfig", "Settings", "in_fp8", "recipe_of", "register"]


def __getattr__(name: str) -> object:
    if name == "ConvertCallback":
        from ._callback import ConvertCallback

        return ConvertCallback
    if name == "ConvertConfig":
        from ._quantizer import ConvertConfig

        return ConvertConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
