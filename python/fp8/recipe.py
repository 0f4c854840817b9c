"""The recipes of `fused_linear`: scaling and format of each operand, accumulation of each product.

The C++ side (csrc/linear/recipe.h) decides what runs; this table describes the same recipes to a
reader and lets Python refuse an unknown one early. A test holds the two together: the names, the
options, and which strings are recipes.

The three products of a linear layer: fprop y = x·Wᵀ, dgrad dx = dy·W, wgrad dW = dyᵀ·x.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Recipe:
    """A recipe's name and options; the other fields say what the name stands for.

    `str(recipe)` is what the operator takes: the name, then each option that is set after a colon.
    Whatever takes a recipe takes this string or the object. Frozen, comparable, hashable.

    Args:
        name: a key of `fp8.RECIPES`. Unknown: ValueError.
        power_of_two: scales that are computed are powers of two: quant_multiplier is rounded down
            to one, so that scaling by itself rounds nothing. Formats whose scales are exponents
            (MX, blocks on Blackwell) hold no others. amax lands in the upper half of FP8's range
            instead of at its end: less than one bit of the range is lost.

    Example:
        >>> str(fp8.Recipe("rowwise", power_of_two=True))
        'rowwise:power_of_two'
    """

    name: str
    power_of_two: bool = field(default=False, kw_only=True)

    granularity: Literal["tensorwise", "rowwise", "blockwise"] = field(init=False, repr=False)
    """One scale per tensor, one per row along the contracted dimension, or one per block: of 128
    elements along it for x and dy, of 128 x 128 for the weight."""
    scaling: Literal["dynamic", "delayed"] = field(init=False, repr=False)
    """Scales from the tensor itself, or from the largest amax of the 16 calls before where that is
    near (README, "Delayed scaling")."""
    input_dtype: torch.dtype = field(init=False, repr=False)
    weight_dtype: torch.dtype = field(init=False, repr=False)
    grad_output_dtype: torch.dtype = field(init=False, repr=False)
    wgrad: Literal["fp8", "high precision"] = field(init=False, repr=False)
    """What dW is computed in. High precision: from x and dy in their own dtype, so x itself is kept
    for the backward."""
    fast_accum: tuple[str, ...] = field(init=False, repr=False)
    """The products that use the tensor cores' fast accumulation; the others are promoted to fp32 in
    steps (split)."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _FORMATS:
            raise _unknown(self.name)
        for option in OPTIONS:
            if not isinstance(getattr(self, option), bool):
                got = getattr(self, option)
                raise TypeError(f"fp8.Recipe: expected {option} to be a bool, got {got!r}")
        for key, value in zip(_FIELDS, _FORMATS[self.name], strict=True):
            object.__setattr__(self, key, value)

    def __str__(self) -> str:
        return ":".join([self.name, *(option for option in OPTIONS if getattr(self, option))])


OPTIONS = ("power_of_two",)
"""The options of every recipe, in the order in which its string has them."""

_E4M3 = torch.float8_e4m3fn
_E5M2 = torch.float8_e5m2
_FPROP = ("fprop",)

_FIELDS = (
    "granularity",
    "scaling",
    "input_dtype",
    "weight_dtype",
    "grad_output_dtype",
    "wgrad",
    "fast_accum",
)
_FORMATS: Mapping[str, tuple[Any, ...]] = {
    # The fastest with dynamic scales. dy has the wider range of e5m2, since one scale serves the
    # whole tensor.
    "tensorwise": ("tensorwise", "dynamic", _E4M3, _E4M3, _E5M2, "fp8", _FPROP),
    # A scale per row isolates outliers, so e4m3 is enough for dy too.
    "rowwise": ("rowwise", "dynamic", _E4M3, _E4M3, _E4M3, "fp8", _FPROP),
    # As rowwise, with the weight gradient (the product most sensitive to rounding) left
    # unquantized.
    "rowwise_gw_hp": ("rowwise", "dynamic", _E4M3, _E4M3, _E4M3, "high precision", _FPROP),
    # DeepSeek-V3's: an outlier costs its block of 128 elements precision, not its row.
    "blockwise": ("blockwise", "dynamic", _E4M3, _E4M3, _E4M3, "fp8", ()),
    # tensorwise in one pass over each tensor, as a rule.
    "delayed": ("tensorwise", "delayed", _E4M3, _E4M3, _E5M2, "fp8", _FPROP),
}


def _unknown(got: object) -> ValueError:
    names = ", ".join(repr(name) for name in _FORMATS)
    options = ", ".join(f"':{option}'" for option in OPTIONS)
    return ValueError(  # as in C++
        f"fp8: expected a recipe out of {names}, with options out of {options}, got {got!r}"
    )


RECIPES: Mapping[str, Recipe] = MappingProxyType({name: Recipe(name) for name in _FORMATS})
"""The recipes without options, by name."""


def check_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe that is meant: a Recipe, or its string ("rowwise", "rowwise:power_of_two").

    Raises ValueError that lists the known names and options.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise _unknown(recipe)
    name, *options = recipe.split(":")
    if not options and name in RECIPES:
        return RECIPES[name]
    if name not in RECIPES or not set(options) <= set(OPTIONS) or len(set(options)) < len(options):
        raise _unknown(recipe)
    return Recipe(name, **dict.fromkeys(options, True))
