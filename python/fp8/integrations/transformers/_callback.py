"""The callback of transformers' Trainer, and of the trainers that derive from it (TRL's)."""

import weakref
from typing import Any

from torch import nn

from ...conversion import convert
from .._missing import missing
from .._options import check_options

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing("fp8.integrations.transformers", "transformers", "5.17.0", error) from error


class ConvertCallback(TrainerCallback):
    """Calls `fp8.convert` on the model of a Trainer, before accelerate wraps it.

    With `model_init` a Trainer makes a model anew when it trains: that one is converted when
    training begins.

    Args:
        recipe: as of `fp8.convert`.
        options: filter, experts_recipe, fuse, save, as of `fp8.convert`.

    Raises TypeError for an unknown option and ValueError for an unknown recipe.

    Example:
        >>> Trainer(model=model, args=arguments, callbacks=[ConvertCallback("rowwise")])
    """

    def __init__(self, recipe: Any = "tensorwise", **options: Any) -> None:
        self._options = check_options(type(self).__name__, {"recipe": recipe, **options})
        self._converted: weakref.ref[nn.Module] | None = None

    def on_init_end(self, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """The end of Trainer's constructor: convert."""
        self._once(model)

    def on_train_begin(self, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Convert, if it is another model."""
        self._once(model)

    def _once(self, model: nn.Module | None) -> None:
        if model is not None and (self._converted is None or self._converted() is not model):
            convert(model, **self._options)
            self._converted = weakref.ref(model)
