"""Lightning: precision plugins that convert the model when Trainer or Fabric sets it up.

    lightning.Trainer(plugins=fp8.integrations.lightning.Precision("bf16-true", recipe="rowwise"))
    lightning.Fabric(plugins=fp8.integrations.lightning.FabricPrecision("bf16-true"))

Weights, gradients and optimizer are those of Lightning's own "bf16-true" or "16-true"; the layers
that `fp8.convert` chooses compute in FP8. FSDPStrategy takes no precision plugin but its own:
there, and with "bf16-mixed", call `fp8.convert` in `configure_model`.
"""

from typing import Any, Literal

from torch import nn

from ..conversion import convert
from ._missing import missing
from ._options import check_options

try:
    from lightning.fabric.plugins.precision.half import HalfPrecision as _Fabric
    from lightning.pytorch.plugins.precision.half import HalfPrecision as _Trainer
except ImportError as error:
    raise missing(__name__, "lightning", "2.6.6", error) from error

__all__ = ["FabricPrecision", "Precision"]


class Precision(_Trainer):
    """For `lightning.Trainer(plugins=...)`: Lightning's half precision, and then `fp8.convert`.

    Args:
        precision: "bf16-true" or "16-true", the dtype of the weights.
        options: of `fp8.convert`: recipe, filter, experts_recipe, fuse, save.

    Raises TypeError for an unknown option and ValueError for an unknown recipe.
    """

    def __init__(
        self, precision: Literal["bf16-true", "16-true"] = "bf16-true", **options: Any
    ) -> None:
        super().__init__(precision)
        self._options = check_options(type(self).__name__, options)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module, cast and converted in place."""
        converted: nn.Module = convert(super().convert_module(module), **self._options)
        return converted


class FabricPrecision(_Fabric):
    """For `lightning.Fabric(plugins=...)`; see `Precision`."""

    def __init__(
        self, precision: Literal["bf16-true", "16-true"] = "bf16-true", **options: Any
    ) -> None:
        super().__init__(precision)
        self._options = check_options(type(self).__name__, options)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module, cast and converted in place."""
        converted: nn.Module = convert(super().convert_module(module), **self._options)
        return converted
