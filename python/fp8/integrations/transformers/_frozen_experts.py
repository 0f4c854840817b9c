"""Experts whose weights are FP8, through `from_pretrained`: what _frozen_quantizer.py does of them.

transformers itself merges the codes of single experts, as it merges numbers; their scales, which
may be of no shape that it can merge, are read here when it is done.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints._experts_plan import ALL, ExpertsCodes
from ...checkpoints._load import Source
from ...conversion._freeze_experts import set_codes
from ...nn._frozen_experts import WEIGHTS, FrozenExperts
from ...nn._frozen_stack import Stack, empty_stack, quantized_stack
from ...recipe import Recipe
from ._names import merging_of


def skeleton(module: nn.Module, codes: ExpertsCodes) -> None:
    """Make an experts module of the meta device a frozen one that has codes, and no scales yet. One
    that stores its weights transposed, into which transformers would merge them so, stays as it is:
    `settle` reads all of it."""
    merged = codes.down[0].expert == ALL
    if isinstance(module, FrozenExperts) or (vars(module)["is_transposed"] and not merged):
        return
    experts = module._parameters["down_proj"].size(0)  # type: ignore[union-attr]
    device = torch.device("meta")
    gate_up, down = (
        empty_stack(codes.granularity, (experts, last.first + last.shape[0], last.shape[1]), device)
        for last in (codes.gate_up[-1], codes.down[-1])
    )
    set_codes(module, gate_up, down, False)
    for name in WEIGHTS:
        del module._parameters[name + module.scale_suffix]  # type: ignore[operator]


def are_merged(model: nn.Module, prefix: str, codes: ExpertsCodes) -> bool:
    """Whether transformers knows how to merge the codes into the parameters of the module called
    `prefix`."""
    merged = merging_of(model)
    return all(
        merged(slices[0].source) == f"{prefix}.{name}"
        for name, slices in zip(WEIGHTS, (codes.gate_up, codes.down), strict=True)
    )


def settle(
    module: nn.Module, codes: ExpertsCodes, source: Source, dtype: torch.dtype, merged: bool
) -> None:
    """The scales, when transformers has merged the codes; or both. dtype: of the experts in high
    precision."""
    if not isinstance(module, FrozenExperts):
        for name in WEIGHTS:  # codes as numbers, or none
            old: Any = module._parameters[name]
            room = torch.empty(old.shape, dtype=dtype, device=old.device)
            module._parameters[name] = nn.Parameter(room, requires_grad=False)
    if not isinstance(module, FrozenExperts) or not merged:
        source.freeze_experts(module, codes)
        return
    up, down = (
        source.with_scales(module._parameters[name].detach(), slices, codes.granularity)  # type: ignore
        for name, slices in zip(WEIGHTS, (codes.gate_up, codes.down), strict=True)
    )
    set_codes(module, up, down, source.power_of_two(codes))


def quantize(module: nn.Module, name: str, weight: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """One weight of an experts module, as it comes from the file: the parameters that take its
    place."""
    dtype = module._parameters[name].dtype  # type: ignore[union-attr]
    stack = quantized_stack(weight.to(dtype), bool(vars(module)["is_transposed"]), recipe)
    made = {name: stack.codes, f"{name}_scale": stack.scales}
    for key, values in made.items():
        module._parameters[key] = nn.Parameter(values, requires_grad=False)
    return {key: module._parameters[key] for key in made}  # type: ignore[misc]


def finish(modules: Iterable[tuple[nn.Module, Recipe, torch.dtype]]) -> None:
    """Frozen experts of what `quantize` left."""
    for module, recipe, dtype in modules:
        parameters: dict[str, Any] = module._parameters
        stacks = []
        for name in WEIGHTS:
            scales = parameters.pop(f"{name}_scale", None)
            if scales is None:  # the checkpoint has it not: it is drawn, in high precision
                turned = bool(vars(module)["is_transposed"])
                stacks.append(quantized_stack(parameters[name].to(dtype), turned, recipe))
            else:
                stacks.append(Stack(parameters[name].detach(), scales.detach(), recipe.granularity))
        set_codes(module, stacks[0], stacks[1], recipe.power_of_two, dtype)
