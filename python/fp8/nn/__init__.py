"""Modules that compute in FP8: `Linear`, and `GroupedLinear` for groups of rows; and `RMSNorm`,
fused."""

from ._grouped import GroupedLinear
from ._linear import Linear
from ._norms import RMSNorm

__all__ = ["GroupedLinear", "Linear", "RMSNorm"]
