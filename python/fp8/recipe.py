"""The recipes of linear layers, dense and grouped: scaling and format of each operand, accumulation
of each product.

The table is the native library's (csrc/torch/common/recipe.h), so it describes what runs. The
grammar of strings is written here a second time, for errors before anything runs; a test holds the
two equal.

The three products of a linear layer: fprop y = x·Wᵀ, dgrad dx = dy·W, wgrad dW = dyᵀ·x.
"""

from collections.abc import Iterable, Mapping
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
    near (docs/recipes.md)."""
    input_dtype: torch.dtype = field(init=False, repr=False)
    weight_dtype: torch.dtype = field(init=False, repr=False)
    grad_output_dtype: torch.dtype = field(init=False, repr=False)
    wgrad: Literal["fp8", "high precision"] = field(init=False, repr=False)
    """What dW is computed in. High precision: from x and dy in their own dtype, so x itself is kept
    for the backward; so with blocks in grouped layers, too."""
    fast_accum: tuple[str, ...] = field(init=False, repr=False)
    """The products that use the tensor cores' fast accumulation; the others are promoted to fp32 in
    steps (split). On the CPU all are."""
    linears: tuple[Literal["dense", "grouped"], ...] = field(init=False, repr=False)
    """Which layers take it. Grouped ones, and experts, take those in e4m3 with scales per row or
    block, as their products do."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _TABLE:
            raise _unknown(self.name)
        for option in OPTIONS:
            if not isinstance(getattr(self, option), bool):
                got = getattr(self, option)
                raise TypeError(f"fp8.Recipe: expected {option} to be a bool, got {got!r}")
        for key, value in _TABLE[self.name].items():
            object.__setattr__(self, key, value)

    def __str__(self) -> str:
        return ":".join([self.name, *(option for option in OPTIONS if getattr(self, option))])


def _described(row: dict[str, str]) -> dict[str, Any]:
    """A row of the library's table, which is of words alone, as fields of Recipe."""
    fields: dict[str, Any] = dict(row)
    for key in ("input_dtype", "weight_dtype", "grad_output_dtype"):
        fields[key] = getattr(torch, row[key])
    for key in ("fast_accum", "linears"):
        fields[key] = tuple(row[key].split())
    return fields


_rows, _options, _grouped_default = torch.ops.fp8._recipes()
_TABLE: Mapping[str, dict[str, Any]] = {row["name"]: _described(row) for row in _rows}

OPTIONS: tuple[str, ...] = tuple(_options)
"""The options of every recipe, in the order in which its string has them."""

DEFAULT_GROUPED_RECIPE: str = _grouped_default
"""Of grouped linears and experts, "rowwise": as measured, it takes the least memory, is the fastest
but where groups are small, and trains as bf16 does (docs/moe.md)."""

RECIPES: Mapping[str, Recipe] = MappingProxyType({name: Recipe(name) for name in _TABLE})
"""The recipes without options, by name. Dense linears take all of them:

- `tensorwise`: the fastest with dynamic scales. dy has the wider range of e5m2, since one scale
  serves the whole tensor.
- `rowwise`: a scale per row isolates outliers, so e4m3 is enough for dy too.
- `rowwise_gw_hp`: as rowwise, with the weight gradient (the product most sensitive to rounding)
  left unquantized.
- `blockwise`: DeepSeek-V3's. An outlier costs its block of 128 elements precision, not its row.
- `delayed`: tensorwise in one pass over each tensor, as a rule.
- `rowwise_fast`, `rowwise_fast_gw_hp`: with fast accumulation of gradients too.
"""

GROUPED_RECIPES: tuple[str, ...] = tuple(
    name for name, recipe in RECIPES.items() if "grouped" in recipe.linears
)
"""The names of those that grouped linears and experts take, with every option."""


def _names(names: Iterable[str], prefix: str = "") -> str:
    return ", ".join(repr(prefix + name) for name in names)


def _unknown(got: object) -> ValueError:
    return ValueError(  # as in C++
        f"fp8: expected a recipe out of {_names(_TABLE)}, with options out of "
        f"{_names(OPTIONS, ':')}, got {got!r}"
    )


def _parsed(text: object) -> Recipe | None:
    """None for what names no recipe."""
    if not isinstance(text, str):
        return None
    name, *options = text.split(":")
    if name not in RECIPES or not set(options) <= set(OPTIONS) or len(set(options)) < len(options):
        return None
    return Recipe(name, **dict.fromkeys(options, True)) if options else RECIPES[name]


def check_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe that is meant: a Recipe, or its string ("rowwise", "rowwise:power_of_two").

    Raises ValueError that lists the known names and options.
    """
    found = recipe if isinstance(recipe, Recipe) else _parsed(recipe)
    if found is None:
        raise _unknown(recipe)
    return found


def check_grouped_recipe(recipe: str | Recipe) -> Recipe:
    """The same for grouped linears and experts, which take the recipes of their products.

    Raises ValueError that says which.
    """
    found = recipe if isinstance(recipe, Recipe) else _parsed(recipe)
    if found is None or "grouped" not in found.linears:
        got = str(found) if found else recipe
        raise ValueError(  # as in C++
            "fp8: expected a recipe with scales per row or block, as the grouped products take: "
            f"{_names(GROUPED_RECIPES)}, with options out of {_names(OPTIONS, ':')}, got {got!r}"
        )
    return found
