"""Experts as checkpoints have them: a linear layer for each expert and projection; or merged, where
the rows of gate and up alternate."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..conversion._freeze_experts import is_interleaved, unfit_experts
from ..integrations.transformers import _experts
from ..nn._freezing import Codes
from ..nn._frozen_experts import FrozenExperts
from ..nn._frozen_stack import Stack, part, quantized_part, quantized_stack
from ..nn._scales import Granularity
from ..recipe import Recipe, check_recipe

_PARTS = (("gate_up_proj", 0), ("gate_up_proj", 1), ("down_proj", 0))
"""Gate, up and down: the parameter, and which of its parts of as many rows."""


class Part(NamedTuple):
    """One projection of one expert, or of all."""

    name: str
    shape: tuple[int, int] | tuple[int, int, int]  # [N, K], or [E, N, K]
    granularity: Granularity
    power_of_two: bool
    get: Callable[[], Codes]


def is_coded(module: nn.Module) -> bool:
    """Whether it is an experts module that is exported as codes: frozen, or one that was converted
    and could be frozen."""
    if isinstance(module, FrozenExperts):
        return True
    return _experts.in_fp8(module) and unfit_experts(module) is None


def parts_of(module: nn.Module, prefix: str, names: tuple[str, str, str]) -> Iterator[Part]:
    """Of a module that is_coded: expert by expert, gate, up and down, called so; merged where gate
    and up alternate. Raises ValueError where
    blocks lie across gate and up."""
    dot = f"{prefix}." if prefix else ""
    if isinstance(module, FrozenExperts):
        kind, power_of_two = module.granularity, module.power_of_two
        experts, hidden, inner = module.down_proj.shape
        get: Callable[..., Codes] = partial(_of_frozen, module)
    else:
        recipe = check_recipe(_experts.recipe_of(module))
        kind, power_of_two = recipe.granularity, recipe.power_of_two
        experts = module._parameters["down_proj"].size(0)  # type: ignore[union-attr]
        inner, hidden = _experts.products_of(module)[1]
        get = partial(_of_converted, module, recipe)
    if is_interleaved(module):
        for weight, shape in (
            ("gate_up_proj", (2 * inner, hidden)),
            ("down_proj", (hidden, inner)),
        ):
            whole = partial(_of_all, module, weight)
            yield Part(dot + weight, (experts, *shape), kind, power_of_two, whole)
        return
    if kind == "blockwise" and inner % 128:
        raise ValueError(
            f"fp8: {prefix or '(model)'} has blocks of 128 x 128 that lie across gate and up, "
            f"which are {inner} rows each: a checkpoint has them apart. Take the recipe 'rowwise'"
        )
    for expert in range(experts):
        for name, (weight, place) in zip(names, _PARTS, strict=True):
            shape = (hidden, inner) if weight == "down_proj" else (inner, hidden)
            own = partial(get, weight, expert, place * inner, shape[0])
            yield Part(f"{dot}{expert}.{name}", shape, kind, power_of_two, own)


def _of_all(module: nn.Module, weight: str) -> Codes:
    if isinstance(module, FrozenExperts):
        kind, power_of_two = module.granularity, module.power_of_two
        return _codes(getattr(module, weight), module.scales(weight), kind, power_of_two)
    recipe = check_recipe(_experts.recipe_of(module))
    given: Any = module._parameters[weight]
    stack = quantized_stack(given, bool(vars(module)["is_transposed"]), recipe)
    return _codes(stack.codes, stack.scales, recipe.granularity, recipe.power_of_two)


def _of_frozen(module: FrozenExperts, weight: str, expert: int, first: int, rows: int) -> Codes:
    stack = Stack(getattr(module, weight), module.scales(weight), module.granularity)
    return _codes(*part(stack, expert, first, rows), module.granularity, module.power_of_two)


def _of_converted(
    module: nn.Module, recipe: Recipe, weight: str, expert: int, first: int, rows: int
) -> Codes:
    whole: Any = module._parameters[weight]
    matrix = whole[expert].t() if vars(module)["is_transposed"] else whole[expert]
    codes, scale = quantized_part(matrix[first : first + rows], recipe)
    return _codes(codes, scale, recipe.granularity, recipe.power_of_two)


def _codes(codes: Tensor, scale: Tensor, kind: Granularity, power_of_two: bool) -> Codes:
    return Codes(codes, scale, None, kind, None, power_of_two)
