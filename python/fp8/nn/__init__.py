"""Modules that compute in FP8: `Linear`, `GroupedLinear` for groups of rows, and the blocks
`GatedMLP` and `MLP`; and `RMSNorm`, fused."""

# What pickles of fused norms name.
from ._fused_norms import NormSpec as _NormSpec  # noqa: F401
from ._fused_norms import fused_norm as _fused_norm  # noqa: F401
from ._grouped import GroupedLinear
from ._linear import Linear
from ._mlp import MLP, GatedMLP
from ._norms import RMSNorm

__all__ = ["MLP", "GatedMLP", "GroupedLinear", "Linear", "RMSNorm"]
