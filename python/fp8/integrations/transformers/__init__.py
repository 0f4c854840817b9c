"""Hugging Face transformers: `fp8` as an experts implementation of its mixtures of experts.

`register()` puts it into transformers' registry. `import fp8` does that where the registry is
loaded already, and `fp8.convert` does. So the call is needed in one case: fp8 was imported first,
and a model is to take the implementation by its name.

    import fp8
    from transformers import AutoModelForCausalLM

    fp8.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="fp8")

`in_fp8` and `recipe_of` say of an experts module whether it runs in FP8, and how.
"""

from ._experts import Settings, in_fp8, recipe_of
from ._registration import register

__all__ = ["Settings", "in_fp8", "recipe_of", "register"]
