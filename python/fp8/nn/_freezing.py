"""The codes of a linear layer: what its forward computes of its weight in every call, once; or
those that are given, checked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..recipe import Recipe, check_recipe
from ._linear import Linear
from ._scales import Granularity, go_together, granularity_of, shape_of, to_float32, usual_input

_ops = torch.ops.fp8
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Codes(NamedTuple):
    """A weight in FP8, and how its input is to be quantized."""

    weight: Tensor  # [N, K] float8_e4m3fn
    scale: Tensor  # float32
    input_scale: Tensor | None
    granularity: Granularity
    input_granularity: Granularity | None
    power_of_two: bool


def check_granularity(granularity: object, name: str = "fp8.FrozenLinear") -> None:
    """Raises ValueError, in the name of a class, for an unknown one."""
    known = ("tensorwise", "rowwise", "blockwise")
    if granularity not in known:
        raise ValueError(f"{name}: expected a granularity of {known}, got {granularity!r}")


def input_granularity_of(codes: Codes) -> Granularity:
    """What of the input shares a scale: what the codes say, or else what is usual beside them.
    ValueError where there is no product of the two."""
    own = codes.input_granularity
    if own is None:
        own = "tensorwise" if codes.input_scale is not None else usual_input(codes.granularity)
    check_granularity(own)
    if not go_together(codes.granularity, own):
        raise ValueError(
            "fp8.FrozenLinear: expected input_granularity 'blockwise' beside a weight in blocks, "
            f"and 'tensorwise' or 'rowwise' beside others, got {own!r} beside {codes.granularity!r}"
        )
    if codes.input_scale is not None and own != "tensorwise":
        raise ValueError(
            "fp8.FrozenLinear: expected input_granularity 'tensorwise' beside a static input "
            f"scale, got {own!r}"
        )
    return own


def given(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    *,
    granularity: Granularity | None,
    input_granularity: Granularity | None,
    power_of_two: bool,
) -> Codes:
    """Tensors of `FrozenLinear.from_codes` as codes. Raises TypeError and ValueError."""
    name = "fp8.FrozenLinear.from_codes"
    if not isinstance(weight, Tensor) or weight.dtype != torch.float8_e4m3fn or weight.dim() != 2:
        raise TypeError(f"{name}: expected weight [N, K] in float8_e4m3fn, got {_text(weight)}")
    rows, cols = weight.shape
    found = granularity or granularity_of(tuple(weight_scale.shape), rows, cols)
    expected = None if found is None else torch.Size(shape_of(found, rows, cols)).numel()
    if found is None or weight_scale.numel() != expected:
        raise ValueError(
            f"{name}: expected weight_scale of one element, [{rows}, 1] or "
            f"{list(shape_of('blockwise', rows, cols))} beside weight [{rows}, {cols}]"
            f"{f' scaled {granularity}' if granularity else ''}, got {_text(weight_scale)}"
        )
    if input_scale is not None and input_scale.numel() != 1:
        raise ValueError(f"{name}: expected input_scale of one element, got {_text(input_scale)}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"{name}: expected bias [{rows}], got {_text(bias)}")
    return Codes(
        weight.detach(),
        to_float32(weight_scale.detach(), f"{name}: weight_scale"),
        None if input_scale is None else to_float32(input_scale.detach(), f"{name}: input_scale"),
        found,
        input_granularity,
        power_of_two,
    )


def _text(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{list(value.shape)} in {str(value.dtype).removeprefix('torch.')}"


def recipe_of(linear: nn.Linear, recipe: str | Recipe | None) -> Recipe:
    """The recipe by which a layer is frozen; ValueError for an unknown one, or one that does not go
    with the layer's static scale."""
    if recipe is None:
        recipe = linear.recipe if isinstance(linear, Linear) else "rowwise"
    found = check_recipe(recipe)
    static = isinstance(linear, Linear) and linear.input_scale is not None
    if static and found.granularity != "tensorwise":
        raise ValueError(
            "fp8.freeze: the layer has a static input_scale, which is for tensorwise recipes, got "
            f"{str(found)!r}; fp8.uncalibrate(model) goes back to dynamic scales"
        )
    return found


def quantized(linear: nn.Linear, recipe: str | Recipe | None = None) -> Codes:
    """The codes of one layer. Raises as `recipe_of`, and TypeError for a weight that is not in high
    precision."""
    return quantized_together([linear], recipe)[0]


@torch.inference_mode(False)  # normal tensors, whatever the caller's mode
@torch.no_grad()
def quantized_together(
    linears: Sequence[nn.Linear], recipe: str | Recipe | None = None
) -> list[Codes]:
    """The codes of layers that are computed as one product (`fp8.ops.merged_linear`): with one
    scale per tensor they share it. Where blocks would lie across two layers, each has its own."""
    found = recipe_of(linears[0], recipe)
    weights = [linear.weight.detach() for linear in linears]
    for weight in weights:
        if weight.dtype not in _DTYPES:
            got = str(weight.dtype).removeprefix("torch.")
            raise TypeError(
                f"fp8.freeze: expected a weight in bfloat16, float16 or float32, got {got}"
            )
    if len(weights) > 1 and found.granularity == "tensorwise":
        data, scale = _quantize(torch.cat(weights), found)
        parts = torch.split(data, [weight.size(0) for weight in weights])
        pairs = [(part, scale.clone()) for part in parts]  # a parameter each
    else:
        pairs = [_quantize(weight, found) for weight in weights]
    return [
        Codes(
            _alone(data),
            _alone(scale).reshape(shape_of(found.granularity, *data.shape)),
            _static(linear),
            found.granularity,
            found.granularity,
            found.power_of_two,
        )
        for linear, (data, scale) in zip(linears, pairs, strict=True)
    ]


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, in memory of its own size: without the padding that quantizing leaves."""
    fits = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _quantize(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    op: Any = {
        "tensorwise": _ops.quantize_tensorwise,
        "rowwise": _ops.quantize_rowwise,
        "blockwise": _ops.quantize_blockwise_128x128,
    }[recipe.granularity]
    data, scale = op.default(weight, power_of_two=recipe.power_of_two)
    return data, scale


def quantized_weight(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Codes and scales of one matrix [N, K], as `FrozenLinear` has them."""
    data, scale = _quantize(weight, recipe)
    return data, scale.reshape(shape_of(recipe.granularity, *data.shape))


def _static(linear: nn.Linear) -> Tensor | None:
    scale = linear.input_scale if isinstance(linear, Linear) else None
    return None if scale is None else scale.detach().float().clone().reshape(1)
