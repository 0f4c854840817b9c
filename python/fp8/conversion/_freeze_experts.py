"""Which experts modules `fp8.freeze` and `fp8.load` make `fp8.FrozenExperts`, and how."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..integrations.transformers import _experts
from ..integrations.transformers._gating import gate_of
from ..nn._calls import has_own_forward
from ..nn._frozen_experts import WEIGHTS, FrozenExperts, GateForm, freeze_experts_in_place
from ..nn._frozen_stack import Stack, quantized_stack
from ..nn._linear import Linear
from ..recipe import DEFAULT_GROUPED_RECIPE, GROUPED_RECIPES, Recipe, check_recipe
from ._expert_rules import FoundExperts


def not_frozen_experts(
    model: nn.Module, mixtures: Sequence[FoundExperts], shared: dict[nn.Module, str]
) -> dict[nn.Module, str]:
    """Which experts modules of a model freeze leaves alone by default, and why. shared: modules
    whose parameters others have too."""
    converted = is_converted(model)
    reasons = {}
    for found in mixtures:
        why = unfit_experts(found.module) or shared.get(found.module)
        if why is None and converted and not _experts.in_fp8(found.module):
            why = "in high precision beside layers that were converted"
        if why is not None:
            reasons[found.module] = why
    return reasons


def is_converted(model: nn.Module) -> bool:
    """Whether anything computes in FP8 with a weight that is not: what does not, was left so."""
    return any(isinstance(m, Linear) or _experts.in_fp8(m) for m in model.modules())


def unfit_experts(module: nn.Module) -> str | None:
    """Why the weights of an experts module cannot become codes, or None."""
    why = _experts.refused(module) or _experts.unfused(module)
    if why is not None:
        return why
    if has_own_forward(module):
        return "its forward was replaced on the instance; freeze before that"
    for name in WEIGHTS:
        weight = module._parameters.get(name)
        if weight is None:
            return f"its {name} is no parameter"
        if hasattr(weight, "__tensor_flatten__") or type(weight).__name__ == "DTensor":
            return f"its weights are a {type(weight).__name__}"
    return None


def is_interleaved(module: nn.Module) -> bool:
    """Whether the rows of gate and up alternate, as gpt-oss has them."""
    if isinstance(module, FrozenExperts):
        return module.gate_form[1]
    gate = gate_of(module)
    return gate is not None and gate.interleaved


def experts_recipe_of(module: nn.Module, recipe: Recipe | None) -> Recipe:
    """By which one an experts module is frozen: its own, if it was converted and none is asked for;
    else the one that is asked for, if experts take it, or "rowwise"."""
    if recipe is not None:
        return recipe if recipe.name in GROUPED_RECIPES else _with_options_of(recipe)
    own = _experts.recipe_of(module) if _experts.in_fp8(module) else DEFAULT_GROUPED_RECIPE
    return check_recipe(own)


def _with_options_of(recipe: Recipe) -> Recipe:
    option = ":power_of_two" if recipe.power_of_two else ""
    return check_recipe(DEFAULT_GROUPED_RECIPE + option)


def freeze_experts(module: nn.Module, recipe: Recipe) -> None:
    """In place: the codes that the converted module's forward computes in every call."""
    turned = bool(vars(module)["is_transposed"])
    gate_up, down = (
        quantized_stack(module._parameters[name], turned, recipe)  # type: ignore[arg-type]
        for name in WEIGHTS
    )
    set_codes(module, gate_up, down, recipe.power_of_two)


def set_codes(
    module: nn.Module,
    gate_up: Stack,
    down: Stack,
    power_of_two: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Make an experts module that fits (`unfit_experts`), or a frozen one, hold these codes. dtype:
    what it computes in; None for that of its weights."""
    if isinstance(module, FrozenExperts):
        form = GateForm(*module.gate_form)
    else:
        gate: Any = gate_of(module)
        form = GateForm(*gate)
        _experts.drop_settings(module)
    freeze_experts_in_place(module, gate_up, down, form, power_of_two, dtype)
