"""`convert`, `revert` and `summary`: FP8 for the nn.Linear modules of a model, in place.

A converted module stays the same object and only its class changes, nn.Linear to fp8.Linear. So
everything that refers to the module or its parameters keeps working: optimizers, hooks, tied
parameters, modules used in two places, a model that itself is an nn.Linear. Which modules are
changed is decided in rules.py.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .experts import convert_experts, revert_experts, summary_rows
from .linear import Linear
from .recipe import check_recipe
from .rules import Found, dtype_name, find_linears

ModelT = TypeVar("ModelT", bound=nn.Module)


def convert(
    model: ModelT,
    recipe: str = "tensorwise",
    filter: Callable[[nn.Linear, str], bool] | None = None,
) -> ModelT:
    """Make every suitable nn.Linear of `model` compute in FP8. In place; returns `model`.

    So do the experts of transformers' mixture-of-experts models, where a layer's experts are one
    module: their implementation becomes `fp8` (experts.py), with the grouped recipe `rowwise`, or
    `rowwise_gw_hp` for that recipe. Routers stay as they are.

    Parameters, state_dict keys and module objects stay the same. Convert after the weights have
    their dtype and before torch.compile, DDP or FSDP wrap the model. A module that is an fp8.Linear
    already takes the new recipe.

    Args:
        model: any module; it may itself be an nn.Linear.
        recipe: a key of `fp8.RECIPES`.
        filter: filter(module, name) -> bool, called once per module with its name in
            `model.named_modules()`: True converts, False leaves it as it is. It is asked about
            experts modules too, which are no nn.Linear. It replaces the
            default rules, which leave alone `lm_head` and the shapes for which
            `fp8.rules.worthwhile` sees no gain. The safety rules hold in any case: subclasses of
            nn.Linear, modules whose weight is used without calling them, and weights that are not
            bfloat16, float16 or float32 are left alone.

    Warns (UserWarning) if nothing was converted. `print(fp8.summary(model))` shows the reason for
    every module.

    Raises TypeError for a model that is no nn.Module and ValueError for an unknown recipe, before
    anything is changed.

    Example:
        >>> model = fp8.convert(model, "rowwise", filter=lambda module, name: "router" not in name)
    """
    _check_model("convert", model)
    check_recipe(recipe)
    if filter is not None and not callable(filter):
        raise TypeError(
            "fp8.convert: filter must be a function (module, name) -> bool, "
            f"got {type(filter).__name__}"
        )
    linears = find_linears(model)
    # All choices come before the first change: a filter that raises leaves the model as it was.
    chosen = [
        linear.module
        for linear in linears
        if linear.refused() is None and _selected(linear, recipe, filter)
    ]
    change_experts = convert_experts(model, recipe, filter)  # type: ignore[arg-type]
    for module in chosen:
        module.__class__ = Linear
        vars(module)["recipe"] = recipe
    if change_experts() == 0 and not chosen:
        warnings.warn(_nothing_converted(linears), stacklevel=2)
    return model


def revert(model: ModelT) -> ModelT:
    """Make every fp8.Linear of `model` an nn.Linear again, and its experts what they were. In
    place; returns `model`.

    Those that convert changed and those that were made as fp8.Linear alike.

    Warns (UserWarning) about modules that cannot be changed back: those that something else has
    turned into a subclass of fp8.Linear (a parametrization, say) or whose forward was replaced on
    the instance. Undo that first.

    Raises TypeError for a model that is no nn.Module.
    """
    _check_model("revert", model)
    revert_experts(model)
    for linear in find_linears(model):
        module = linear.module
        if not isinstance(module, Linear):
            continue
        obstacle = None
        if type(module) is not Linear:
            obstacle = f"its class is {type(module).__name__}, a subclass"
        elif "forward" in vars(module):
            obstacle = "its forward was replaced on the instance"
        if obstacle is not None:
            message = f"fp8.revert: {_label(linear)} stays in FP8: {obstacle}; undo that first"
            warnings.warn(message, stacklevel=2)
            continue
        vars(module).pop("recipe", None)
        module.__class__ = nn.Linear  # type: ignore[assignment]
    return model


def summary(model: nn.Module) -> str:
    """A table of every nn.Linear: name, shape, dtype, recipe or why it is left alone; and totals.

    One line each, experts modules last. `not converted` means that no rule speaks against it:
    convert was not called, or its filter left the module out. A module with several names is listed
    under the first; the others follow in brackets.

    Raises TypeError for a model that is no nn.Module.

    Example:
        >>> print(fp8.summary(model))
        name          in -> out      dtype     recipe
        blocks.0.up   4096 -> 14336  bfloat16  tensorwise
        blocks.0.kv   4096 -> 256    bfloat16  - (small: K*N/(K+N) = 240, FP8 gains from 768)
        2 linear: 1 in FP8 (1 tensorwise), 1 left alone; 98.2% of their weight elements in FP8
    """
    _check_model("summary", model)
    linears = find_linears(model)
    recipes = Counter(
        linear.module.recipe for linear in linears if isinstance(linear.module, Linear)
    )
    # The shape rule wants a recipe: the one in use here, or else convert's default.
    shape_recipe = next(iter(recipes), "tensorwise")
    rows = [("name", "in -> out", "dtype", "recipe")]
    for linear in linears:
        shape = f"{linear.module.in_features} -> {linear.module.out_features}"
        dtype = dtype_name(getattr(linear.module, "weight", None))
        rows.append((_label(linear), shape, dtype, _status(linear, shape_recipe)))
    expert_rows, expert_totals = summary_rows(model)
    rows += expert_rows
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    totals = [_totals(linears, recipes)]
    if expert_totals is not None:
        totals.append(expert_totals)
    return "\n".join([*lines, *totals])


def _selected(linear: Found, recipe: str, filter: Callable[[nn.Linear, str], bool] | None) -> bool:
    if filter is None:
        return linear.unselected(recipe) is None
    return bool(filter(linear.module, linear.name))


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fp8.{function}: expected a torch.nn.Module, got {type(model).__name__}")


def _nothing_converted(linears: list[Found]) -> str:
    if not linears:
        return "fp8.convert converted nothing: the model has no nn.Linear"
    return (
        f"fp8.convert converted nothing: all {len(linears)} nn.Linear modules were left alone; "
        "print(fp8.summary(model)) shows why"
    )


def _status(linear: Found, recipe: str) -> str:
    refused = linear.refused()
    if isinstance(linear.module, Linear):  # refused, for instance, after model.double()
        return linear.module.recipe + (f" ({refused})" if refused else "")
    return f"- ({refused or linear.unselected(recipe) or 'not converted'})"


def _label(linear: Found) -> str:
    name = linear.name or "(model)"
    return f"{name} [{', '.join(linear.aliases)}]" if linear.aliases else name


def _totals(linears: list[Found], recipes: Counter[str]) -> str:
    if not linears:
        return "no nn.Linear"
    sizes = {
        linear.module: linear.module.in_features * linear.module.out_features for linear in linears
    }
    converted = sum(size for module, size in sizes.items() if isinstance(module, Linear))
    share = 100 * converted / max(sum(sizes.values()), 1)
    kinds = ", ".join(f"{count} {recipe}" for recipe, count in recipes.items()) or "none"
    return (
        f"{len(linears)} linear: {recipes.total()} in FP8 ({kinds}), "
        f"{len(linears) - recipes.total()} left alone; {share:.1f}% of their weight elements in FP8"
    )
