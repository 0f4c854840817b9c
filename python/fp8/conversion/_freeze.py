"""`freeze`: weights that are FP8, in place of weights that are quantized in every call.

As in `convert` a module stays the same object and its class changes, to fp8.FrozenLinear; but here
its weight goes, and codes and scales take its place. Which modules, and why not the others, is
decided by the rules of _rules.py and by those here; for experts, in _freeze_experts.py.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..nn._calls import has_own_forward
from ..nn._freezing import quantized_together, recipe_of
from ..nn._frozen import FrozenLinear, freeze_in_place
from ..nn._frozen_experts import FrozenExperts
from ..nn._fused_mlps import own_class as own_class_of_mlp
from ..nn._fused_siblings import can_read, groups_of, joint_layers
from ..nn._fused_siblings import own_class as own_class_of_siblings
from ..nn._linear import Linear
from ..nn._merged import MergedLinear
from ..nn._mlp import MLP, GatedMLP
from ..recipe import Recipe, check_recipe
from . import _mlp_fusion, _sibling_fusion
from ._convert import check_model
from ._expert_rules import find_experts
from ._freeze_experts import (
    experts_recipe_of,
    freeze_experts,
    is_converted,
    not_frozen_experts,
    unfit_experts,
)
from ._readers import dtype_readers
from ._rules import Found, find_linears, label

ModelT = TypeVar("ModelT", bound=nn.Module)

_BLOCKS = (GatedMLP, MLP, MergedLinear)


def freeze(
    model: ModelT,
    recipe: str | Recipe | None = None,
    filter: Callable[[Any, str], bool] | None = None,
    *,
    decode: bool | None = None,
) -> ModelT:
    """Make every suitable nn.Linear and fp8.Linear of `model` a FrozenLinear, and every suitable
    experts module of transformers' mixtures a FrozenExperts. In place; returns `model`.

    Their weights become codes in FP8 with their scales, N·K bytes in place of 2 or 4 times as many,
    and cannot be trained any more; gradients still reach what is before the layers, and their
    biases. Nothing but the input is quantized in a call then.

    Outputs keep their bits: a frozen layer holds what the forward of an fp8.Linear with its recipe
    computes of the weight, so a converted model in eval mode gives, frozen, the logits that it gave
    before, unless `decode=True`. Exceptions: `delayed` scales by calls gone by, and becomes
    `tensorwise`, which it is without a history; the forward under autocast casts a float32 weight
    first (to have those bits, cast the model, `model.to(torch.bfloat16)`, before). Layers that
    `fp8.convert` computes as one, with one scale per tensor, keep the scale that they share; where
    blocks of 128 rows lie across two such layers, values differ within the error of quantizing.

    Left alone are, whatever the filter says: weights that another module has too (tied embeddings),
    subclasses of nn.Linear, layers whose weight is used without calling them, weights that are not
    bfloat16, float16 or float32 or that are sharded, layers whose input is cast to the dtype of
    their weight (T5's `wo`), children of fp8.GatedMLP, fp8.MLP and fp8.MergedLinear, and experts
    whose gate `fp8.ops.moe_experts` does not have, or of widths that are no multiples of 16. By
    default `lm_head`, routers and layers whose weight is read past their forward too; and, in a
    converted model, what `fp8.convert` left in high precision. The sizes for which training gains
    do not count: half the memory is half the memory. Norms and rotations that convert fused stay
    fused; MLPs and layers of one input are computed layer by layer from then on.

    Args:
        model: any module; it may itself be a linear.
        recipe: a key of `fp8.RECIPES`, with options, for all layers; of it counts how x and the
            weight are scaled. Experts take "rowwise" in place of one that they have not (one
            scale per tensor). None: what was converted keeps its own, others take "rowwise".
        filter: filter(module, name) -> bool, in place of the default rules, called once per module
            that may be frozen, with its name in `model.named_modules()`.
        decode: the layers' attribute of that name. True: few rows are multiplied by a kernel made
            for them, which is faster and adds in another order, with the same codes and scales.
            False: fp8.Linear's bits for any number of rows. None: False of what was converted,
            which keeps its bits, True of the others.

    Memory, at most: the model, and the codes of the layers that were frozen already. An optimizer
    that knows the old weights keeps them: make a new one.

    Warns (UserWarning) if nothing was frozen. `print(fp8.summary(model))` shows the reason for
    every module.

    Raises TypeError for a model that is no nn.Module, and ValueError for an unknown recipe, or one
    that is not tensorwise where a layer has a static input scale: before anything is changed.

    Example:
        >>> model = fp8.freeze(fp8.convert(model, "rowwise"))
        >>> model = fp8.freeze(model, "blockwise", filter=lambda module, name: "mlp" in name)
    """
    check_model("freeze", model)
    if recipe is not None:
        recipe = check_recipe(recipe)
    if filter is not None and not callable(filter):
        raise TypeError(
            "fp8.freeze: filter must be a function (module, name) -> bool, "
            f"got {type(filter).__name__}"
        )
    if decode is not None and not isinstance(decode, bool):
        raise TypeError(f"fp8.freeze: expected decode True, False or None, got {decode!r:.80}")
    linears, mixtures = find_linears(model), find_experts(model)
    reasons = not_frozen(model, linears, by_default=filter is None)
    chosen = [
        linear
        for linear in linears
        if linear.module not in reasons and (filter is None or filter(linear.module, linear.name))
    ]
    shared = shared_weights(model)
    if filter is None:
        left = not_frozen_experts(model, mixtures, shared)
        experts = [found.module for found in mixtures if found.module not in left]
    else:
        able = [m for m in mixtures if not unfit_experts(m.module) and m.module not in shared]
        experts = [found.module for found in able if filter(found.module, found.name)]
    recipes = {}
    for linear in chosen:
        try:
            recipes[linear.module] = recipe_of(linear.module, recipe)
        except ValueError as error:
            raise ValueError(f"{error} ({label(linear)})") from None
    for group in sharing_a_scale(model, [linear.module for linear in chosen], recipes):
        codes = quantized_together(group, recipes[group[0]])
        for module, own in zip(group, codes, strict=True):
            by_decode = not isinstance(module, Linear) if decode is None else decode
            freeze_in_place(module, own)
            if not by_decode:
                module.decode = False  # type: ignore[assignment]
    for mixture in experts:
        freeze_experts(mixture, experts_recipe_of(mixture, recipe))
    unfuse(model)
    frozen = (FrozenLinear, FrozenExperts)
    if not any(isinstance(module, frozen) for module in model.modules()):
        also = f" and {len(mixtures)} experts modules" if mixtures else ""
        warnings.warn(
            f"fp8.freeze froze nothing: of {len(linears)} nn.Linear modules{also} none is "
            "suitable; print(fp8.summary(model)) shows why",
            stacklevel=2,
        )
    return model


def not_frozen(
    model: nn.Module, linears: Sequence[Found], by_default: bool = True
) -> dict[nn.Linear, str]:
    """Which linears of a model freeze leaves alone, and why; without the default rules where there
    is a filter."""
    others = shared_weights(model) | _in_blocks(model)
    for module, where in dtype_readers(model).items():
        others[module] = f"{where} casts to the dtype of its weight"
    converted = is_converted(model)
    reasons: dict[nn.Linear, str] = {}
    for linear in linears:
        module = linear.module
        why = linear.refused() or unfit(module) or others.get(module)
        if why is None and by_default and not isinstance(module, Linear):
            why = linear.exempt()
            if why is None and converted:
                why = "in high precision beside layers that were converted"
        if why is not None:
            reasons[module] = why
    return reasons


def unfit(module: nn.Linear) -> str | None:
    """Why the weight of a module cannot become codes, beside what convert asks."""
    if has_own_forward(module):
        return "its forward was replaced on the instance; freeze before that"
    if "weight" not in module._parameters:
        return "its weight is no parameter"
    if hasattr(module.weight, "__tensor_flatten__") or type(module.weight).__name__ == "DTensor":
        return f"its weight is a {type(module.weight).__name__}"
    return None


def shared_weights(model: nn.Module) -> dict[nn.Module, str]:
    """Modules whose weight another one has too: frozen, they would have copies that differ."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name or "(model)", module))
    found = {}
    for sharing in owners.values():
        for _, module in sharing:
            other = next((name for name, owner in sharing if owner is not module), None)
            if other is not None:
                found[module] = f"its weight is shared with {other}"
    return found


def _in_blocks(model: nn.Module) -> dict[nn.Module, str]:
    return {
        child: f"a layer of an fp8.{type(block).__name__}"
        for block in model.modules()
        if isinstance(block, _BLOCKS)
        for child in block.children()
    }


def unfuse(model: nn.Module) -> None:
    """Modules that convert fused for layers that are frozen now run their class's forward: so they
    would anyway, after looking what their layers are."""
    for module in model.modules():
        if own_class_of_mlp(type(module)) is not None:
            if any(isinstance(child, FrozenLinear) for child in module.children()):
                _mlp_fusion.undo(module)
            continue
        base = own_class_of_siblings(type(module))
        if base is not None and not groups_of(module, base):
            _sibling_fusion.undo(module)


@torch.inference_mode(False)
def _are_read_together(layers: Sequence[nn.Linear]) -> bool:
    """Whether the forward of their fused parent computes layers as one, for inputs of their own
    dtype."""
    weight = layers[0].weight
    return can_read(weight.new_empty((0, weight.size(1))), layers)


def sharing_a_scale(
    model: nn.Module, chosen: Sequence[nn.Linear], recipes: dict[nn.Linear, Recipe]
) -> list[list[nn.Linear]]:
    """The layers to be frozen, those together that are computed as one and so share a scale."""
    left = dict.fromkeys(chosen)
    groups: list[list[nn.Linear]] = []
    for parent in model.modules():
        for layers in joint_layers(parent):
            whole = all(layer in left for layer in layers) and _are_read_together(layers)
            if whole and len({recipes[layer] for layer in layers}) == 1:
                groups.append(list(layers))
                for layer in layers:
                    del left[layer]
    return groups + [[layer] for layer in left]
