"""Modules that compute in FP8: `Linear`, and `GroupedLinear` for groups of rows."""

from ._grouped import GroupedLinear
from ._linear import Linear

__all__ = ["GroupedLinear", "Linear"]
