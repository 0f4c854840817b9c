"""Modules that compute in FP8: `Linear`, `GroupedLinear` for groups of rows, and the blocks
`GatedMLP` and `MLP`."""

from ._grouped import GroupedLinear
from ._linear import Linear
from ._mlp import MLP, GatedMLP

__all__ = ["MLP", "GatedMLP", "GroupedLinear", "Linear"]
