"""What is done around training: tuning, calibrating, keeping weights in FP8, reporting."""

from ._autotune import AutotuneReport, Tuned, autotune
from ._batch_invariant import batch_invariant
from ._cached_weights import cached_weights
from ._calibrate import calibrate, uncalibrate
from ._info import info, plan_cache_clear, plan_cache_info
from ._numerics import numerics
from ._numerics_report import Numerics
from ._numerics_sums import NumericsRow, Spread

__all__ = [
    "AutotuneReport",
    "Numerics",
    "NumericsRow",
    "Spread",
    "Tuned",
    "autotune",
    "batch_invariant",
    "cached_weights",
    "calibrate",
    "info",
    "numerics",
    "plan_cache_clear",
    "plan_cache_info",
    "uncalibrate",
]
