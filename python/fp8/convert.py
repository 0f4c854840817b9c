"""`convert`, `revert` and `summary`: FP8 for the nn.Linear modules of a model, in place.

And for the experts of Hugging Face's mixtures of experts: see experts.py. A converted module stays
the same object and only its class changes, nn.Linear to fp8.Linear. So everything that refers to
the module or its parameters keeps working: optimizers, hooks, tied parameters, modules used in two
places, a model that itself is an nn.Linear. Which modules are changed is decided in rules.py and
expert_rules.py.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from . import experts, transformers_hook
from ._collectives import spare_collectives
from .expert_rules import FoundExperts, find_experts
from .grouped import check_grouped_recipe
from .linear import Linear, check_static
from .recipe import Recipe, check_recipe
from .rules import Found, dtype_name, find_linears, left_alone

ModelT = TypeVar("ModelT", bound=nn.Module)


def convert(
    model: ModelT,
    recipe: str | Recipe = "tensorwise",
    filter: Callable[[Any, str], bool] | None = None,
    *,
    experts_recipe: str | None = None,
) -> ModelT:
    """Make every suitable nn.Linear of `model` compute in FP8. In place; returns `model`.

    So do the experts modules of Hugging Face's mixture-of-experts models: they take the experts
    implementation `fp8`, whatever the rest of the model uses. Routers stay as they are.

    Parameters, state_dict keys and module objects stay the same. Convert after the weights have
    their dtype and before torch.compile, DDP or FSDP wrap the model. A module that is an fp8.Linear
    already takes the new recipe, and keeps a static input scale.

    Args:
        model: any module; it may itself be an nn.Linear.
        recipe: a key of `fp8.RECIPES`, with options in a string ("rowwise:power_of_two") or as an
            `fp8.Recipe`.
        filter: filter(module, name) -> bool, called once per nn.Linear and experts module with its
            name in `model.named_modules()`: True converts, False leaves it as it is. It replaces
            the default rules, which leave alone `lm_head`, routers, the shapes for which
            `fp8.rules.worthwhile` or `fp8.expert_rules.worthwhile` sees no gain, and models of
            small layers (`fp8.rules.MIN_MEAN_SIZE`). The safety rules hold in any case: subclasses
            of nn.Linear, modules whose weight is used without calling them, and weights that are
            not bfloat16, float16 or float32 are left alone.
        experts_recipe: of experts, out of `fp8.GROUPED_RECIPES`; None: "rowwise_gw_hp", whatever
            the linears take, because an FP8 weight gradient does not pay for small groups of rows.

    Warns (UserWarning) if nothing was converted. `print(fp8.summary(model))` shows the reason for
    every module.

    Raises TypeError for a model that is no nn.Module and ValueError for an unknown recipe, or one
    that is not tensorwise where a module has a static input scale, before anything is changed.

    Example:
        >>> model = fp8.convert(model, "rowwise", filter=lambda module, name: "router" not in name)
    """
    _check_model("convert", model)
    recipe = str(check_recipe(recipe))
    experts_recipe = check_grouped_recipe(experts_recipe or experts.DEFAULT_RECIPE)
    if filter is not None and not callable(filter):
        raise TypeError(
            "fp8.convert: filter must be a function (module, name) -> bool, "
            f"got {type(filter).__name__}"
        )
    linears, mixtures = find_linears(model), find_experts(model)
    # All choices come before the first change: a filter that raises leaves the model as it was.
    if filter is None:
        reasons = left_alone(linears, recipe)
        found = [linear for linear in linears if linear.module not in reasons]
        able = [m.module for m in mixtures if m.refused() is None and m.unselected() is None]
    else:
        found = [
            linear
            for linear in linears
            if linear.refused() is None and filter(linear.module, linear.name)
        ]
        able = [m.module for m in mixtures if m.refused() is None and filter(m.module, m.name)]
    for linear in found:
        if isinstance(linear.module, Linear) and linear.module.input_scale is not None:
            check_static(recipe, f"fp8.convert: {_label(linear)}")
    chosen = [linear.module for linear in found]
    spare_collectives()
    for module in chosen:
        module.__class__ = Linear
        vars(module)["recipe"] = recipe
    if able:
        transformers_hook.register()
    copies: dict[int, Any] = {}
    for mixture in able:
        experts.set_fp8(mixture, experts_recipe, copies)
    if not chosen and not able:
        warnings.warn(_nothing_converted(linears, mixtures), stacklevel=2)
    return model


def revert(model: ModelT) -> ModelT:
    """Make every fp8.Linear of `model` an nn.Linear again. In place; returns `model`.

    Those that convert changed and those that were made as fp8.Linear alike. Experts modules get
    their previous implementation back, or transformers' default if `fp8` was chosen by
    set_experts_implementation. Static input scales go.

    Warns (UserWarning) about modules that cannot be changed back: those that something else has
    turned into a subclass of fp8.Linear (a parametrization, say) or whose forward was replaced on
    the instance. Undo that first.

    Raises TypeError for a model that is no nn.Module.
    """
    _check_model("revert", model)
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
        module.input_scale = None
        module.__class__ = nn.Linear  # type: ignore[assignment]
    for mixture in find_experts(model):
        experts.unset_fp8(mixture.module)
    return model


def summary(model: nn.Module) -> str:
    """A table of every nn.Linear: name, shape, dtype, recipe or why it is left alone; and totals.

    One line each, and one for each experts module: number of experts x shapes. `not converted`
    means that no rule speaks against it: convert was not called, or its filter left the module out.
    A module with several names is listed under the first; the others follow in brackets.

    Raises TypeError for a model that is no nn.Module.

    Example:
        >>> print(fp8.summary(model))
        name          in -> out      dtype     recipe
        blocks.0.up   4096 -> 14336  bfloat16  tensorwise
        blocks.0.kv   4096 -> 256    bfloat16  - (small: K*N/(K+N) = 240, FP8 gains from 800)
        2 linear: 1 in FP8 (1 tensorwise), 1 left alone; 98.2% of their weight elements in FP8
    """
    _check_model("summary", model)
    linears, mixtures = find_linears(model), find_experts(model)
    recipes = Counter(
        linear.module.recipe for linear in linears if isinstance(linear.module, Linear)
    )
    # The shape rule wants a recipe: the one in use here, or else convert's default.
    reasons = left_alone(linears, next(iter(recipes), "tensorwise"))
    lines: dict[nn.Module, tuple[str, str, str, str]] = {}
    for linear in linears:
        shape = f"{linear.module.in_features} -> {linear.module.out_features}"
        dtype = dtype_name(getattr(linear.module, "weight", None))
        lines[linear.module] = (_label(linear), shape, dtype, _status(linear, reasons))
    for found in mixtures:
        dtype = dtype_name(experts.weights_of(found.module)[0])
        lines[found.module] = (_label(found), found.shape(), dtype, _experts_status(found))
    rows = [("name", "in -> out", "dtype", "recipe")]
    rows += [lines[module] for module in model.modules() if module in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    return "\n".join([*table, _totals(linears, recipes), *_experts_totals(mixtures)])


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fp8.{function}: expected a torch.nn.Module, got {type(model).__name__}")


def _nothing_converted(linears: list[Found], mixtures: list[FoundExperts]) -> str:
    if not linears and not mixtures:
        return "fp8.convert converted nothing: the model has no nn.Linear"
    also = f" and {len(mixtures)} experts modules" if mixtures else ""
    return (
        f"fp8.convert converted nothing: all {len(linears)} nn.Linear modules{also} were left "
        "alone; print(fp8.summary(model)) shows why"
    )


def _status(linear: Found, reasons: Mapping[nn.Linear, str]) -> str:
    if isinstance(linear.module, Linear):
        static = "" if linear.module.input_scale is None else ", static input_scale"
        refused = linear.refused()  # for instance after model.double()
        return linear.module.recipe + static + (f" ({refused})" if refused else "")
    return f"- ({reasons.get(linear.module, 'not converted')})"


def _experts_status(found: FoundExperts) -> str:
    refused = found.refused()
    if not experts.in_fp8(found.module):
        return f"- ({refused or found.unselected() or 'not converted'})"
    recipe = experts.recipe_of(found.module)
    if refused:  # after the conversion, or chosen by set_experts_implementation
        return f"{recipe} ({refused}: runs {experts.fallback_name(found.module)})"
    unfused = experts.unfused(found.module)
    return f"{recipe} (passes not fused: {unfused})" if unfused else recipe


def _label(found: Found | FoundExperts) -> str:
    name = found.name or "(model)"
    return f"{name} [{', '.join(found.aliases)}]" if found.aliases else name


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


def _experts_totals(mixtures: list[FoundExperts]) -> list[str]:
    if not mixtures:
        return []
    running = [m for m in mixtures if experts.in_fp8(m.module) and m.refused() is None]
    recipes = Counter(experts.recipe_of(m.module) for m in running)
    share = 100 * sum(m.numel() for m in running) / max(sum(m.numel() for m in mixtures), 1)
    kinds = ", ".join(f"{count} {recipe}" for recipe, count in recipes.items()) or "none"
    return [
        f"{len(mixtures)} experts: {len(running)} in FP8 ({kinds}), "
        f"{len(mixtures) - len(running)} left alone; {share:.1f}% of their weight elements in FP8"
    ]
