"""The recipes of `fused_linear`: scaling and format of each operand, accumulation of each product.

The C++ side (csrc/linear/recipe.h) decides what runs; this table describes the same recipes to a
reader and lets Python refuse an unknown name early. A test holds the two lists together.

The three products of a linear layer: fprop y = x·Wᵀ, dgrad dx = dy·W, wgrad dW = dyᵀ·x.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch


@dataclass(frozen=True)
class Recipe:
    """One row of the table. Frozen: a recipe is named, not configured."""

    name: str
    granularity: Literal["tensorwise", "rowwise", "blockwise"]
    """One scale per tensor, one per row along the contracted dimension, or one per block: of 128
    elements along it for x and dy, of 128 x 128 for the weight."""
    input_dtype: torch.dtype
    weight_dtype: torch.dtype
    grad_output_dtype: torch.dtype
    wgrad: Literal["fp8", "high precision"]
    """What dW is computed in. High precision: from x and dy in their own dtype, so x itself is kept
    for the backward."""
    fast_accum: tuple[str, ...] = ("fprop",)
    """The products that use the tensor cores' fast accumulation; the others are promoted to fp32 in
    steps (split)."""


_E4M3 = torch.float8_e4m3fn
_E5M2 = torch.float8_e5m2

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            # The fastest. dy has the wider range of e5m2, since one scale serves the whole tensor.
            Recipe("tensorwise", "tensorwise", _E4M3, _E4M3, _E5M2, "fp8"),
            # A scale per row isolates outliers, so e4m3 is enough for dy too.
            Recipe("rowwise", "rowwise", _E4M3, _E4M3, _E4M3, "fp8"),
            # As rowwise, with the weight gradient (the product most sensitive to rounding) left
            # unquantized.
            Recipe("rowwise_gw_hp", "rowwise", _E4M3, _E4M3, _E4M3, "high precision"),
            # DeepSeek-V3's: an outlier costs its block of 128 elements precision, not its row.
            Recipe("blockwise", "blockwise", _E4M3, _E4M3, _E4M3, "fp8", fast_accum=()),
        )
    }
)


def check_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError that lists the known ones."""
    recipe = RECIPES.get(name) if isinstance(name, str) else None
    if recipe is None:
        known = ", ".join(repr(known) for known in RECIPES)
        raise ValueError(f"fp8: expected a recipe out of {known}, got {name!r}")  # as in C++
    return recipe
