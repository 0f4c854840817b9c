"""Megatron-Core: its tensor parallel linears, with the product in FP8.

    spec = fp8.integrations.megatron.in_fp8(get_gpt_layer_local_spec(), "rowwise")

Weights, their shards, names, initialization and checkpoints are Megatron's, and so are the
collectives: activations travel in their own precision. The backward adds into `weight.main_grad`.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import _main_grad
from ..recipe import Recipe, check_recipe
from ._missing import missing

try:
    from megatron.core import tensor_parallel
    from megatron.core.transformer.spec_utils import ModuleSpec
except ImportError as error:
    raise missing(__name__, "megatron-core", "0.16.1", error) from error

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "in_fp8"]


class _InFP8(nn.Module):
    recipe: str

    def __init__(self, *args: Any, recipe: str = "tensorwise", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **others: Any,
    ) -> Tensor:
        if sequence_parallel:  # the backward scatters what it has reduced
            input = tensor_parallel.gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=tp_group)
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is not None:
            return _main_grad.linear(input, weight, bias, self.recipe, main_grad, None, None)
        y: Tensor = torch.ops.fp8.fused_linear(input, weight, bias, self.recipe)
        return y


class ColumnParallelLinear(_InFP8, tensor_parallel.ColumnParallelLinear):
    """Megatron's, of the output features' shards."""


class RowParallelLinear(_InFP8, tensor_parallel.RowParallelLinear):
    """Megatron's, of the input features' shards."""


_OURS = {
    tensor_parallel.ColumnParallelLinear: ColumnParallelLinear,
    tensor_parallel.RowParallelLinear: RowParallelLinear,
}


def in_fp8(spec: Any, recipe: str | Recipe = "tensorwise") -> Any:
    """A copy of a ModuleSpec whose parallel linears are those of this module; its other parts,
    embeddings and output layer of the model among them, stay.

    Args:
        spec: of a layer or of a block, with Megatron's own ("local") linears.
        recipe: of `fp8.RECIPES`, options included, but `delayed`, for which there is no history.

    Raises ValueError for another recipe, and for a spec without such linears (one of Transformer
    Engine).
    """
    name = str(check_recipe(recipe))
    if check_recipe(recipe).scaling == "delayed":
        raise ValueError(
            "fp8.integrations.megatron.in_fp8: expected a recipe of dynamic scaling, got 'delayed'"
        )
    replaced = _replaced(spec, name)
    if replaced is spec:
        raise ValueError(
            "fp8.integrations.megatron.in_fp8: expected a spec with ColumnParallelLinear or "
            f"RowParallelLinear of megatron.core.tensor_parallel, got {spec!r:.200}"
        )
    return replaced


def _replaced(part: Any, recipe: str) -> Any:
    """The part, or a copy of it where something in it is another."""
    if isinstance(part, type):
        ours = _OURS.get(part)
        return part if ours is None else ModuleSpec(ours, params={"recipe": recipe})
    if isinstance(part, ModuleSpec) and part.module in _OURS:
        params = {**part.params, "recipe": recipe}
        return dataclasses.replace(part, module=_OURS[part.module], params=params)
    if isinstance(part, list):
        parts = [_replaced(one, recipe) for one in part]
        return part if all(a is b for a, b in zip(parts, part, strict=True)) else parts
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
    others = {name: _replaced(value, recipe) for name, value in values.items()}
    changed = {name: value for name, value in others.items() if value is not values[name]}
    return dataclasses.replace(part, **changed) if changed else part
