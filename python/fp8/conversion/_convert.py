"""`convert` and `revert`: FP8 for the nn.Linear modules of a model, in place.

And for the experts of Hugging Face's mixtures of experts: see integrations/transformers/. A
converted module stays the same object and only its class changes, nn.Linear to fp8.Linear. So
everything that refers to the module or its parameters keeps working: optimizers, hooks, tied
parameters, modules used in two places, a model that itself is an nn.Linear. Which modules are
changed is decided in _rules.py and _expert_rules.py.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .._native.collectives import spare_collectives
from ..integrations.transformers import _experts, _registration
from ..nn import _histories
from ..nn._calls import forget_call
from ..nn._linear import Linear, check_static
from ..nn._mlp import check_save
from ..recipe import DEFAULT_GROUPED_RECIPE, Recipe, check_grouped_recipe, check_recipe
from . import _fusions, _mlp_fusion
from ._classes import replaced
from ._expert_rules import FoundExperts, find_experts
from ._rules import Found, find_conv1d, find_linears, label, left_alone

ModelT = TypeVar("ModelT", bound=nn.Module)


def convert(
    model: ModelT,
    recipe: str | Recipe = "tensorwise",
    filter: Callable[[Any, str], bool] | None = None,
    *,
    experts_recipe: str | Recipe | None = None,
    fuse: bool | Iterable[str] = True,
    save: str = "bf16",
) -> ModelT:
    """Make every suitable nn.Linear of `model` compute in FP8. In place; returns `model`.

    So do the experts modules of Hugging Face's mixture-of-experts models: they take the experts
    implementation `fp8`, whatever the rest of the model uses. Routers stay as they are. What stands
    around the linears runs as fused operators where that is proven to be the same (`fuse`).

    Parameters, state_dict keys and module objects stay the same. Convert after the weights have
    their dtype and before torch.compile, DDP or FSDP wrap the model. A module that is an fp8.Linear
    already takes the new recipe, and keeps a static input scale.

    Args:
        model: any module; it may itself be an nn.Linear.
        recipe: a key of `fp8.RECIPES`, with options in a string ("rowwise:power_of_two") or as an
            `fp8.Recipe`.
        filter: filter(module, name) -> bool, called once per nn.Linear and experts module with its
            name in `model.named_modules()`: True converts, False leaves it as it is. It replaces
            the default rules, which leave alone `lm_head`, routers, modules whose weight is used
            past their forward too (`its weight is used by` in the summary), the shapes for which
            `fp8.conversion.worthwhile` or `experts_worthwhile` sees no gain, and models of small
            layers (`fp8.conversion.MIN_MEAN_SIZE`). The safety rules hold in any case: subclasses
            of nn.Linear, modules whose weight is used without calling them, and weights that are
            not bfloat16, float16 or float32 are left alone.
        experts_recipe: of experts, out of `fp8.GROUPED_RECIPES`, with options as in `recipe`; None:
            "rowwise_gw_hp", whatever the linears take, because an FP8 weight gradient does not pay
            for small groups of rows.
        fuse: which modules run as fused operators, recognized by what they compute, whatever their
            class: True for all of the following, in a model where something is converted; False for
            none; or names, then in any model.
            "norms": RMSNorm and LayerNorm modules (`fp8.ops.rms_norm`, `fp8.ops.layer_norm`), in
            their own precision; values change by the order of float32 sums.
            "rope": modules whose forward rotates q and k by a function of its file
            (`fp8.ops.rope`), with the same bits; other modules keep that function.
            "mlp": MLPs, gated, merged or plain, whose linears run in FP8, as one node
            (`fp8.ops.mlp`), with the same bits but for the input's gradient through two weights,
            which is rounded once less.
            "residual": layers that add to a residual stream and norm it, recognized by the code of
            their forward, do both in one pass (`fp8.ops.add_rms_norm`), where the norm is fused;
            with the same bits.
            "siblings": linears in FP8 that one module calls with one tensor, as q, k and v of
            attention, recognized by the code of its forward (`fp8.ops.merged_linear`): with one
            scale per tensor they share it, and the input's gradient is rounded once.
            Such a module keeps its object, parameters and names and takes a subclass of its class,
            whose forward runs the class's own wherever a call is not of the kind that was
            recognized. Another call of convert with names, or False, undoes what is not among them.
        save: what fused MLPs keep of gate and up for the backward, as in `fp8.ops.mlp`: "bf16",
            the products in their dtype; "fp8", codes in half of 16 bits, whose rounding is in the
            gradients; or "recompute", nothing, for two more products.

    Warns (UserWarning) if nothing was converted. `print(fp8.summary(model))` shows the reason for
    every module.

    Raises TypeError for a model that is no nn.Module and ValueError for an unknown recipe or
    `save`, or a recipe that is not tensorwise where a module has a static input scale. If it
    raises, this or what the filter raises, the model is as it was.

    Example:
        >>> model = fp8.convert(model, "rowwise", filter=lambda module, name: "router" not in name)
    """
    check_model("convert", model)
    recipe = str(check_recipe(recipe))
    if experts_recipe is None:
        experts_recipe = DEFAULT_GROUPED_RECIPE
    experts_recipe = str(check_grouped_recipe(experts_recipe))
    if filter is not None and not callable(filter):
        raise TypeError(
            "fp8.convert: filter must be a function (module, name) -> bool, "
            f"got {type(filter).__name__}"
        )
    fusions = _fusions.chosen(fuse)
    check_save("fp8.convert", save)
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
            check_static(recipe, f"fp8.convert: {label(linear)}")
    chosen = [linear.module for linear in found]
    spare_collectives()
    _registration.register_for(model)
    configs = _experts.fp8_configs(able)
    by_default = fuse is True
    if by_default and not chosen and not able:
        fusions = ()
    fusing = _fusions.plan(model, fusions)
    names = {fusion.name for fusion in fusions}
    undoing = [] if by_default else [f for f in _fusions.fused(model) if f[0].name not in names]
    touched = [*(found.module for _, found in fusing), *(module for _, module in undoing)]
    with _all_or_nothing([*chosen, *able, *touched]):
        for module in model.modules():
            forget_call(module)  # "never called" is said of what ran after this
        for module in chosen:
            vars(module).pop("forward", None)  # that of the class it was: see has_own_forward
            module.__class__ = Linear
            vars(module)["recipe"] = recipe
            _histories.fit(module)  # type: ignore[arg-type]
        for mixture in able:
            _experts.set_fp8(mixture, experts_recipe, configs)
        for fusion, fused in undoing:
            _fusions.undo("convert", fusion, fused)
        for fusion, fusable in fusing:
            fusion.apply(fusable)
        _mlp_fusion.keep(model, save)
    if not chosen and not able and not any(f.is_fused(found.module) for f, found in fusing):
        warnings.warn(_nothing_converted(model, linears, mixtures), stacklevel=2)
    return model


def revert(model: ModelT) -> ModelT:
    """Make every fp8.Linear of `model` an nn.Linear again. In place; returns `model`.

    Those that convert changed and those that were made as fp8.Linear alike. Experts modules get
    their previous implementation back, or transformers' default if `fp8` was chosen by
    set_experts_implementation. Static input scales go, and so does what was fused.

    Warns (UserWarning) about modules that cannot be changed back: those that something else has
    turned into a subclass of fp8.Linear (a parametrization, say) or whose forward was replaced on
    the instance. Undo that first.

    Raises TypeError for a model that is no nn.Module.
    """
    check_model("revert", model)
    converted = []
    for linear in find_linears(model):
        if not isinstance(linear.module, Linear):
            continue
        obstacle = _obstacle(linear.module)
        if obstacle is None:
            converted.append(linear.module)
        else:
            message = f"fp8.revert: {label(linear)} stays in FP8: {obstacle}; undo that first"
            warnings.warn(message, stacklevel=2)  # before any change: it may be made an error
    mixtures = [mixture.module for mixture in find_experts(model)]
    fused = _fusions.fused(model)
    with _all_or_nothing([*converted, *mixtures, *(module for _, module in fused)]):
        for module in converted:
            vars(module).pop("recipe", None)
            vars(module).pop("forward", None)
            forget_call(module)
            module.input_scale = None
            _histories.drop(module)
            module.__class__ = nn.Linear  # type: ignore[assignment]
        for mixture in mixtures:
            _experts.unset_fp8(mixture)
        for fusion, fused_module in fused:
            _fusions.undo("revert", fusion, fused_module)
    return model


def _obstacle(module: Linear) -> str | None:
    if type(module) is not Linear:
        return f"its class is {type(module).__name__}, a subclass"
    return replaced(module)


@contextmanager
def _all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """If the context ends by an exception, an interrupt too, the modules are as before: class,
    attributes and buffers."""
    before = [
        (m, m.__class__, dict(vars(m)), dict(m._buffers), set(m._non_persistent_buffers_set))
        for m in modules
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, buffers, passing in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(passing)
        raise


def check_model(function: str, model: object) -> None:
    """Raises TypeError, in the name of fp8.`function`, for a model that is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fp8.{function}: expected a torch.nn.Module, got {type(model).__name__}")


def _nothing_converted(model: nn.Module, linears: list[Found], mixtures: list[FoundExperts]) -> str:
    conv1d = len(find_conv1d(model))
    others = (
        f" {conv1d} Conv1D layers of transformers (GPT-2's) are not supported" if conv1d else ""
    )
    if not linears and not mixtures:
        return f"fp8.convert converted nothing: the model has no nn.Linear{others and ';' + others}"
    also = f" and {len(mixtures)} experts modules" if mixtures else ""
    return (
        f"fp8.convert converted nothing: all {len(linears)} nn.Linear modules{also} were left "
        f"alone;{others and others + ';'} print(fp8.summary(model)) shows why"
    )
