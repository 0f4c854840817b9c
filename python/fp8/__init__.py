"""Fused FP8 linear layers for eager PyTorch: real operators, forward and backward.

    import fp8

    y = fp8.ops.fused_linear(x, weight, bias)        # one differentiable operator call
    model = fp8.convert(model)                       # every suitable nn.Linear computes in FP8
    print(fp8.summary(model))                        # which ones, and why the others do not
    model = fp8.freeze(model)                        # weights become FP8, for inference

`fp8.nn` has the modules, `fp8.ops` the operators, `fp8.conversion` the rules that `convert`
follows, `fp8.tools` what is done around training, `fp8.integrations` what other libraries need.
What begins with an underscore is private.

Importing registers the operators `torch.ops.fp8.*`. It does not initialize CUDA, and it imports and
changes no other library, whether that is loaded already or not: what other libraries are to know is
registered by `fp8.convert` or by a call of `fp8.integrations` (docs/integrations.md).
"""

from ._native.loader import PACKAGE as _PACKAGE
from ._native.loader import load as _load

# The operators must exist before the modules below look them up.
__version__: str = _load().version

from . import checkpoints as checkpoints
from . import conversion as conversion
from . import integrations as integrations
from . import nn as nn
from . import ops
from . import tools as tools
from ._native import flops as _flops
from ._native import operators as _operators
from .checkpoints import export_weights, load, save
from .conversion import convert, freeze, revert, summary
from .nn import (
    MLP,
    FrozenExperts,
    FrozenLinear,
    GatedMLP,
    GroupedLinear,
    Linear,
    MergedLinear,
    RMSNorm,
)
from .recipe import GROUPED_RECIPES, RECIPES, Recipe
from .tools import (
    autotune,
    batch_invariant,
    cached_weights,
    calibrate,
    info,
    numerics,
    plan_cache_clear,
    plan_cache_info,
    uncalibrate,
)

_flops.install()
_operators.install()

cmake_prefix_path: str = str(_PACKAGE / "share" / "cmake")
"""For C++: `cmake -DCMAKE_PREFIX_PATH=...`, then `find_package(FP8)` and link `FP8::torch`."""

__all__ = [
    "GROUPED_RECIPES",
    "MLP",
    "RECIPES",
    "FrozenExperts",
    "FrozenLinear",
    "GatedMLP",
    "GroupedLinear",
    "Linear",
    "MergedLinear",
    "RMSNorm",
    "Recipe",
    "__version__",
    "autotune",
    "batch_invariant",
    "cached_weights",
    "calibrate",
    "cmake_prefix_path",
    "convert",
    "export_weights",
    "freeze",
    "info",
    "load",
    "numerics",
    "ops",
    "plan_cache_clear",
    "plan_cache_info",
    "revert",
    "save",
    "summary",
    "uncalibrate",
]
