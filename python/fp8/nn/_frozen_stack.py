"""A stack of weights in FP8, one for each expert: codes [E, N, K] and their scales, float32, in the
shapes of _scales.py with the experts in front."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..recipe import Recipe
from ._freezing import check_granularity, quantized_weight
from ._scales import Granularity, blocks_of, to_float32


class Stack(NamedTuple):
    """Codes, scales, and what shares one."""

    codes: Tensor  # [E, N, K] float8_e4m3fn
    scales: Tensor  # scale_shape(granularity, codes.shape)
    granularity: Granularity


def scale_shape(granularity: Granularity, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of new scales of codes [E, N, K]. ValueError for an unknown granularity."""
    check_granularity(granularity, "fp8.FrozenExperts")
    experts, rows, cols = shape
    if granularity == "blockwise":
        return (experts, *blocks_of(rows, cols))
    return (experts, rows if granularity == "rowwise" else 1, 1)


def granularity_of_stack(scale: tuple[int, ...], shape: tuple[int, ...]) -> Granularity | None:
    """Which elements of codes [E, N, K] share a scale, by the shape of all scales, from which
    dimensions of 1 may be gone; None for a shape that means nothing. [E, 1, 1] is of blocks where
    there is one block, [E] and [E, 1] of the expert."""
    experts, rows, _ = shape
    if tuple(scale) == scale_shape("blockwise", shape):
        return "blockwise"
    if tuple(scale) in ((experts,), (experts, 1), (experts, 1, 1)):
        return "tensorwise"
    return "rowwise" if tuple(scale) in ((experts, rows), (experts, rows, 1)) else None


def given_stack(
    name: str, codes: Any, scale: Tensor, granularity: Granularity | None = None
) -> Stack:
    """Tensors from elsewhere, checked. Raises TypeError and ValueError that begin with `name`."""
    if not isinstance(codes, Tensor) or codes.dtype != torch.float8_e4m3fn or codes.dim() != 3:
        got = f"{list(codes.shape)} in {codes.dtype}" if isinstance(codes, Tensor) else type(codes)
        raise TypeError(f"{name}: expected codes [E, N, K] in float8_e4m3fn, got {got}")
    shape = tuple(codes.shape)
    found = granularity or granularity_of_stack(tuple(scale.shape), shape)
    expected = None if found is None else scale_shape(found, shape)
    if found is None or expected is None or scale.numel() != torch.Size(expected).numel():
        raise ValueError(
            f"{name}: expected a scale per expert [{shape[0]}, 1, 1], per row "
            f"{list(scale_shape('rowwise', shape))} or per block "
            f"{list(scale_shape('blockwise', shape))} beside codes {list(shape)}"
            f"{f' scaled {granularity}' if granularity else ''}, got {list(scale.shape)}"
        )
    scales = to_float32(scale.detach(), f"{name}_scale").reshape(expected)
    return Stack(codes.detach(), scales, found)


def together(up: Stack, down: Stack) -> tuple[Stack, Stack]:
    """Both with one granularity: per row where one is that. ValueError for blocks beside others."""
    if up.granularity == down.granularity:
        return up, down
    if "blockwise" in (up.granularity, down.granularity):
        raise ValueError(
            "fp8.FrozenExperts: expected both weights scaled in blocks, or none, got gate_up "
            f"{up.granularity} and down {down.granularity}"
        )
    return _by_row(up), _by_row(down)


def _by_row(stack: Stack) -> Stack:
    shape = scale_shape("rowwise", tuple(stack.codes.shape))
    return Stack(stack.codes, stack.scales.expand(shape).contiguous(), "rowwise")


def empty_stack(granularity: Granularity, shape: tuple[int, ...], device: torch.device) -> Stack:
    """Memory for one, nothing written."""
    codes = torch.empty(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    scales = torch.empty(scale_shape(granularity, shape), dtype=torch.float32, device=device)
    return Stack(codes, scales, granularity)


@torch.inference_mode(False)  # normal tensors, whatever the caller's mode
@torch.no_grad()
def quantized_stack(weight: Tensor, transposed: bool, recipe: Recipe) -> Stack:
    """What a converted module's forward computes of a weight in every call: [E, N, K], or, where it
    is `transposed`, [E, K, N]. Expert by expert: what is needed beside the codes is for one."""
    weight = weight.detach()
    experts, rows, cols = weight.shape
    if transposed:
        rows, cols = cols, rows
    made = empty_stack(recipe.granularity, (experts, rows, cols), weight.device)
    if weight.is_meta:
        return made
    for expert, matrix in enumerate(weight.unbind()):
        put(made, expert, 0, *quantized_part(matrix.t() if transposed else matrix, recipe))
    return made


@torch.inference_mode(False)
@torch.no_grad()
def quantized_part(matrix: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The same of some rows of one expert, [n, K] of any strides: whole blocks, if in blocks."""
    return quantized_weight(matrix.detach().contiguous(), recipe)


def put(stack: Stack, expert: int, first: int, codes: Tensor, scale: Tensor) -> None:
    """Write the rows of one expert from `first` on: codes [n, K] and their scale, one or of rows,
    [n, 1]; or of blocks, where `first` is a multiple of 128."""
    rows = codes.size(0)
    stack.codes[expert, first : first + rows].view(torch.uint8).copy_(codes.view(torch.uint8))
    put_scale(stack, expert, first, rows, scale)


def put_scale(stack: Stack, expert: int, first: int, rows: int, scale: Tensor) -> None:
    """The same of the scale alone, of so many rows."""
    if stack.granularity == "blockwise":
        own = stack.scales[expert, first // 128 : -(-(first + rows) // 128)]
    elif stack.granularity == "rowwise":
        own = stack.scales[expert, first : first + rows]
    else:
        own = stack.scales[expert]
    own.copy_(scale.reshape(own.shape) if scale.numel() == own.numel() else scale.reshape(()))


def part(stack: Stack, expert: int, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Views of what `put` wrote: codes [rows, K] and their scales."""
    codes = stack.codes[expert, first : first + rows]
    if stack.granularity == "tensorwise":
        return codes, stack.scales[expert].reshape(1)
    if stack.granularity == "rowwise":
        return codes, stack.scales[expert, first : first + rows]
    return codes, stack.scales[expert, first // 128 : -(-(first + rows) // 128)]


def dequantized(stack: Stack, dtype: torch.dtype) -> Tensor:
    """Codes times scales, [E, N, K] in `dtype`, expert by expert."""
    out = torch.empty(stack.codes.shape, dtype=dtype, device=stack.codes.device)
    if not stack.codes.is_meta:
        for expert, (codes, scale) in enumerate(_matrices(stack)):
            out[expert].copy_(torch.ops.fp8.dequantize.default(codes, scale, dtype))
    return out


def _matrices(stack: Stack) -> Iterator[tuple[Tensor, Tensor]]:
    for codes, scale in zip(stack.codes.detach(), stack.scales.detach(), strict=True):
        yield codes, scale.reshape(()) if stack.granularity == "tensorwise" else scale
