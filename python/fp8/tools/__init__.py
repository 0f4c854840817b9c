"""What is done around training: tuning, calibrating, keeping weights in FP8, reporting."""

from ._autotune import AutotuneReport, Tuned, autotune
from ._cached_weights import cached_weights
from ._calibrate import calibrate, uncalibrate
from ._info import info, plan_cache_clear, plan_cache_info

__all__ = [
    "AutotuneReport",
    "Tuned",
    "autotune",
    "cached_weights",
    "calibrate",
    "info",
    "plan_cache_clear",
    "plan_cache_info",
    "uncalibrate",
]
