"""Fused FP8 linear layers for eager PyTorch: real operators, forward and backward.

    import fp8

    y = fp8.ops.fused_linear(x, weight, bias)        # one differentiable operator call
    model = fp8.convert(model)                       # every suitable nn.Linear computes in FP8
    print(fp8.summary(model))                        # which ones, and why the others do not

Importing registers the operators `torch.ops.fp8.*`, and `fp8` with Hugging Face transformers as an
experts implementation once that is imported; it does not initialize CUDA or import transformers.
"""

from ._loader import PACKAGE as _PACKAGE
from ._loader import load as _load

# The operators must exist before the modules below look them up.
__version__: str = _load().version

from . import _flops, _operators, ops, transformers_hook
from ._info import info, plan_cache_clear, plan_cache_info
from ._summary import summary
from .autotune import autotune
from .cached_weights import cached_weights
from .calibrate import calibrate, uncalibrate
from .convert import convert, revert
from .grouped import GroupedLinear
from .linear import Linear
from .recipe import GROUPED_RECIPES, RECIPES, Recipe

transformers_hook.install()  # Hugging Face's experts_implementation="fp8"
_flops.install()
_operators.install()

cmake_prefix_path: str = str(_PACKAGE / "share" / "cmake")
"""For C++: `cmake -DCMAKE_PREFIX_PATH=...`, then `find_package(FP8)` and link `FP8::torch`."""

__all__ = [
    "GROUPED_RECIPES",
    "RECIPES",
    "GroupedLinear",
    "Linear",
    "Recipe",
    "__version__",
    "autotune",
    "cached_weights",
    "calibrate",
    "cmake_prefix_path",
    "convert",
    "info",
    "ops",
    "plan_cache_clear",
    "plan_cache_info",
    "revert",
    "summary",
    "uncalibrate",
]
