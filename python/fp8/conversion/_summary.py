"""`summary`: what runs in FP8, and why the rest does not."""

import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..integrations.transformers import _experts
from ..integrations.transformers._gating import was_called
from ..nn._calls import CALLED, never_called
from ..nn._frozen import FrozenLinear
from ..nn._frozen_experts import FrozenExperts
from ..nn._grouped import GroupedLinear
from ..nn._linear import Linear
from . import _fusions
from ._convert import check_model
from ._expert_rules import FoundExperts, find_experts
from ._freeze import not_frozen, shared_weights
from ._freeze_experts import not_frozen_experts
from ._rules import Found, dtype_name, find_conv1d, find_linears, label, left_alone


def summary(model: nn.Module) -> str:
    """A table of every nn.Linear: name, shape, dtype, recipe or why it is left alone; and totals.

    One line each, and one for each experts module: number of experts x shapes. `not converted`
    means that no rule speaks against it: convert was not called, or its filter left the module out.
    A module with several names is listed under the first; the others follow in brackets.
    Frozen layers say so, and in a model that has some, the others in FP8 why they are not.
    `fp8.GroupedLinear` modules have a line, and so has Conv1D of transformers (GPT-2), which is not
    supported. Where `fp8.convert` fused something, modules of that kind have lines: what each runs,
    or why it does not.

    Once the model was called, layers in FP8 that never were say so: something else uses their
    weight, in high precision, or nothing does. A UserWarning names them.

    Raises TypeError for a model that is no nn.Module.

    Example:
        >>> print(fp8.summary(model))
        name          in -> out      dtype     recipe
        blocks.0.up   4096 -> 14336  bfloat16  tensorwise
        blocks.0.kv   4096 -> 256    bfloat16  - (small: K*N/(K+N) = 240, FP8 gains from 800)
        2 linear: 1 in FP8 (1 tensorwise), 1 left alone; 98.2% of their weight elements in FP8
    """
    check_model("summary", model)
    linears, mixtures = find_linears(model), find_experts(model)
    recipes = Counter(
        linear.module.recipe for linear in linears if isinstance(linear.module, Linear)
    )
    frozen = [linear.module for linear in linears if isinstance(linear.module, FrozenLinear)]
    # The shape rule wants a recipe: the one in use here, or else convert's default.
    reasons: Mapping[nn.Linear, str] = left_alone(linears, next(iter(recipes), "tensorwise"))
    if frozen:
        reasons = not_frozen(model, linears)
        recipes.update(f"frozen {module.describe()}" for module in frozen)
    frozen_experts = _frozen_experts_lines(model)
    left = not_frozen_experts(model, mixtures, shared_weights(model))
    lines: dict[nn.Module, Row] = {}
    for linear in linears:
        shape = f"{linear.module.in_features} -> {linear.module.out_features}"
        dtype = dtype_name(getattr(linear.module, "weight", None))
        lines[linear.module] = (label(linear), shape, dtype, _status(linear, reasons, frozen))
    for found in mixtures:
        dtype = dtype_name(_experts.weights_of(found.module)[0])
        status = _experts_status(found)
        if frozen or frozen_experts:
            why = left.get(found.module)
            status += f" (not frozen{f': {why}' if why else ''})"
        lines[found.module] = (label(found), found.shape(), dtype, status)
    lines |= frozen_experts
    grouped, conv1d = _grouped_lines(model), _conv1d_lines(model)
    lines |= grouped | conv1d | dict(_fusions.rows(model))
    never = never_called(model, _calls(lines))
    rows = [("name", "in -> out", "dtype", "recipe")]
    for module in model.modules():
        if module in lines:
            name, shape, dtype, status = lines[module]
            note = ", never called" if module in never else ""
            rows.append((name, shape, dtype, status + note))
    if never:
        names = ", ".join(repr(lines[m][0]) for m in model.modules() if m in never)
        warnings.warn(
            "fp8.summary: in FP8 but never called, so that something else uses their weight, or "
            f"nothing does: {names}",
            stacklevel=2,
        )
    totals = [_totals(linears, recipes), *_experts_totals(mixtures, list(frozen_experts))]
    if grouped:
        totals.append(f"{len(grouped)} fp8.GroupedLinear, all in FP8")
    if conv1d:
        totals.append(f"{len(conv1d)} Conv1D of transformers, none in FP8: not supported")
    totals += _fusions.totals(model)
    return "\n".join([*_aligned(rows), *totals])


Row = tuple[str, str, str, str]


def _aligned(rows: list[Row]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def _calls(lines: Collection[nn.Module]) -> dict[nn.Module, Any]:
    """The layers in FP8, and whether each was called."""
    calls: dict[nn.Module, Any] = {}
    for module in lines:
        kinds = (Linear, FrozenLinear, FrozenExperts, GroupedLinear)
        kind = next((kind for kind in kinds if isinstance(module, kind)), None)
        if kind is not None and type(module).forward is kind.forward:  # a subclass may not mark
            calls[module] = vars(module).get(CALLED)
        elif _experts.in_fp8(module):
            calls[module] = was_called(module)
    return calls


def _frozen_experts_lines(model: nn.Module) -> dict[nn.Module, Row]:
    lines: dict[nn.Module, Row] = {}
    for name, module in model.named_modules():
        if isinstance(module, FrozenExperts):
            experts, hidden, inner = module.down_proj.shape
            shape = f"{experts} x ({hidden} -> {2 * inner}, {inner} -> {hidden})"
            dtype = dtype_name(module.down_proj)
            lines[module] = (name or "(model)", shape, dtype, f"frozen {module.describe()}")
    return lines


def _grouped_lines(model: nn.Module) -> dict[nn.Module, Row]:
    lines: dict[nn.Module, Row] = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            shape = f"{module.num_groups} x ({module.in_features} -> {module.out_features})"
            dtype = dtype_name(getattr(module, "weight", None))
            lines[module] = (name or "(model)", shape, dtype, module.recipe)
    return lines


def _conv1d_lines(model: nn.Module) -> dict[nn.Module, Row]:
    lines: dict[nn.Module, Row] = {}
    for name, module in find_conv1d(model):
        weight = getattr(module, "weight", None)
        shape = " -> ".join(map(str, getattr(weight, "shape", ("-",))))
        lines[module] = (name or "(model)", shape, dtype_name(weight), "- (Conv1D: not supported)")
    return lines


def _status(
    linear: Found, reasons: Mapping[nn.Linear, str], frozen: Collection[nn.Linear] = ()
) -> str:
    if isinstance(linear.module, FrozenLinear):
        return f"frozen {linear.module.describe()}"
    if isinstance(linear.module, Linear):
        static = "" if linear.module.input_scale is None else ", static input_scale"
        refused = linear.refused()  # for instance after model.double()
        if refused is None and frozen:
            why = reasons.get(linear.module)
            refused = f"not frozen: {why}" if why else "not frozen"
        return linear.module.recipe + static + (f" ({refused})" if refused else "")
    return f"- ({reasons.get(linear.module, 'not frozen' if frozen else 'not converted')})"


def _experts_status(found: FoundExperts) -> str:
    refused = found.refused()
    if not _experts.in_fp8(found.module):
        return f"- ({refused or found.unselected() or 'not converted'})"
    recipe = _experts.recipe_of(found.module)
    if refused:  # after the conversion, or chosen by set_experts_implementation
        return f"{recipe} ({refused}: runs {_experts.fallback_name(found.module)})"
    unfused = _experts.unfused(found.module)
    return f"{recipe} (passes not fused: {unfused})" if unfused else recipe


def _totals(linears: list[Found], recipes: Counter[str]) -> str:
    if not linears:
        return "no nn.Linear"
    sizes = {
        linear.module: linear.module.in_features * linear.module.out_features for linear in linears
    }
    in_fp8 = (Linear, FrozenLinear)
    converted = sum(size for module, size in sizes.items() if isinstance(module, in_fp8))
    share = 100 * converted / max(sum(sizes.values()), 1)
    kinds = ", ".join(f"{count} {recipe}" for recipe, count in recipes.items()) or "none"
    return (
        f"{len(linears)} linear: {recipes.total()} in FP8 ({kinds}), "
        f"{len(linears) - recipes.total()} left alone; {share:.1f}% of their weight elements in FP8"
    )


def _experts_totals(mixtures: list[FoundExperts], frozen: list[Any]) -> list[str]:
    count = len(mixtures) + len(frozen)
    if not count:
        return []
    running = [m for m in mixtures if _experts.in_fp8(m.module) and m.refused() is None]
    recipes = Counter(_experts.recipe_of(m.module) for m in running)
    recipes.update(f"frozen {module.describe()}" for module in frozen)
    of_frozen = sum(m.gate_up_proj.numel() + m.down_proj.numel() for m in frozen)
    in_fp8 = of_frozen + sum(m.numel() for m in running)
    share = 100 * in_fp8 / max(of_frozen + sum(m.numel() for m in mixtures), 1)
    kinds = ", ".join(f"{count} {recipe}" for recipe, count in recipes.items()) or "none"
    return [
        f"{count} experts: {recipes.total()} in FP8 ({kinds}), "
        f"{count - recipes.total()} left alone; {share:.1f}% of their weight elements in FP8"
    ]
