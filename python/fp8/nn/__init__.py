"""Modules that compute in FP8: `Linear`, `FrozenLinear` and `FrozenExperts` whose weights are FP8
too, `GroupedLinear` for groups of rows, and the blocks `GatedMLP` and `MLP`; and `RMSNorm`,
fused."""

from ._frozen import FrozenLinear
from ._frozen_experts import FrozenExperts

# What pickles of fused modules name.
from ._fused_classes import stacked as _stacked  # noqa: F401
from ._fused_mlps import Notes as _MLPNotes  # noqa: F401
from ._fused_mlps import fused_mlp as _fused_mlp  # noqa: F401
from ._fused_norms import NormSpec as _NormSpec  # noqa: F401
from ._fused_norms import fused_norm as _fused_norm  # noqa: F401
from ._fused_residuals import residual_layer as _residual_layer  # noqa: F401
from ._fused_rope import rotating_module as _rotating_module  # noqa: F401
from ._fused_siblings import Notes as _SiblingNotes  # noqa: F401
from ._fused_siblings import fused_parent as _fused_parent  # noqa: F401
from ._grouped import GroupedLinear
from ._linear import Linear
from ._merged import MergedLinear
from ._mlp import MLP, GatedMLP
from ._mlp_forms import Form as _MLPForm  # noqa: F401
from ._mlp_probe import MLPSpec as _MLPSpec  # noqa: F401
from ._norms import RMSNorm

__all__ = [
    "MLP",
    "FrozenExperts",
    "FrozenLinear",
    "GatedMLP",
    "GroupedLinear",
    "Linear",
    "MergedLinear",
    "RMSNorm",
]
