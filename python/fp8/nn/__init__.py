"""Modules that compute in FP8: `Linear`, and `GroupedLinear` for groups of rows."""

from ._grouped import GROUPED_RECIPES, GroupedLinear
from ._linear import Linear

__all__ = ["GROUPED_RECIPES", "GroupedLinear", "Linear"]
