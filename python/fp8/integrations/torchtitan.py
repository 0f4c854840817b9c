"""torchtitan: an override that builds `fp8.Linear` where a model's config has a Linear.

--override.imports 'fp8.integrations.torchtitan.linear={"recipe": "rowwise"}'
"""

from dataclasses import dataclass

from .. import nn as fp8_nn
from ..conversion import worthwhile
from ._missing import missing

try:
    from torchtitan.config.override import derive, override
    from torchtitan.models.common.linear import Linear as _Linear
    from torchtitan.protocols.module import Module as _Module
except ImportError as error:
    raise missing(__name__, "torchtitan", "0.3.0", error) from error

__all__ = ["Linear", "linear"]


class Linear(fp8_nn.Linear, _Module):
    """`fp8.Linear`, made from a config as torchtitan makes its modules."""

    @dataclass(kw_only=True, slots=True)
    class Config(_Linear.Config):
        """torchtitan's own, and the recipe."""

        recipe: str = "tensorwise"

    def __init__(self, config: Config) -> None:
        super().__init__(
            config.in_features, config.out_features, bias=config.bias, recipe=config.recipe
        )


@override(
    target=_Linear.Config,
    exact=True,  # what derives from it computes something else
    fqns=["layers.*", "*.layers.*"],  # not the output head
    description="Linear layers in FP8",
)
def linear(
    config: _Linear.Config, recipe: str = "tensorwise", small: bool = False
) -> _Linear.Config:
    """The config of an FP8 layer, for each linear of a model's blocks.

    Args:
        config: of the linear.
        recipe: of `fp8.RECIPES`, options included.
        small: whether layers for which FP8 gains no time (`fp8.conversion.worthwhile`), routers
            among them, are replaced too.
    """
    if not small and worthwhile(config.in_features, config.out_features, recipe) is not None:
        return config
    return derive(config, Linear.Config, recipe=recipe)
