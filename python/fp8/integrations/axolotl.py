"""axolotl: a plugin that converts the model once its weights are loaded, before adapters.

plugins:
  - fp8.integrations.axolotl.Plugin
fp8_recipe: rowwise
"""

from typing import Any

from torch import nn

from ..conversion import convert
from ..recipe import check_recipe
from ._missing import missing

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, field_validator
except ImportError as error:
    raise missing(__name__, "axolotl", "0.19.0", error) from error

__all__ = ["FP8Args", "Plugin"]


class FP8Args(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    fp8_recipe: str = "tensorwise"
    """A recipe of `fp8.convert`."""

    @field_validator("fp8_recipe")
    @classmethod
    def _known(cls, recipe: str) -> str:
        return str(check_recipe(recipe))


class Plugin(BasePlugin):
    """Calls `fp8.convert` with `fp8_recipe`.

    LoRA kernels that read weights past the layers' forward (lora_qkv_kernel, lora_o_kernel,
    lora_mlp_kernel) compute with them in high precision: leave those off.
    """

    def get_input_args(self) -> str:
        """Where axolotl finds `FP8Args`."""
        return f"{__name__}.{FP8Args.__name__}"

    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        """Convert in place."""
        convert(model, cfg.get("fp8_recipe") or "tensorwise")
