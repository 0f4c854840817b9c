"""Nested tensors: fp8.Linear and fused_linear take them as nn.Linear does, no other operator.

The rows of all members lie in one dense tensor, which is the input of one call: with one scale per
tensor the members share it, as the sequences of a padded batch do.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Autograd's comes first. Strided tensors that have none (inference mode) have the others.
KEYS = ("AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA")


def map_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function, which maps rows [..., K] to rows [..., N], over the members of a nested x.

    Jagged: the result has the offsets of x, so that it can be added to x or to what was made of x
    in other ways. Strided: members in x's order.
    """
    if x.layout is torch.jagged:
        return _map_jagged(function, x)
    members = x.unbind()
    if not members:
        raise ValueError("fp8::fused_linear: expected a nested x with members, got none")
    # As rows, since the members' leading dimensions may all differ.
    rows = torch.cat([member.reshape(-1, member.shape[-1]) for member in members])
    counts = [math.prod(member.shape[:-1]) for member in members]
    parts = torch.split(function(rows), counts)
    shaped = [
        part.reshape(*member.shape[:-1], part.shape[-1])
        for part, member in zip(parts, members, strict=True)
    ]
    return torch.nested.as_nested_tensor(shaped, layout=torch.strided)


def _map_jagged(function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    ragged = x._ragged_idx  # torch has no public name for it
    if ragged == x.dim() - 1:
        raise ValueError(
            "fp8::fused_linear: expected x to be ragged in another dimension than the last, "
            f"got shape {list(x.shape)}"
        )
    values, offsets, lengths = x.values(), x.offsets(), x.lengths()
    if lengths is not None:  # rows that no member has must not enter a scale
        row = torch.arange(values.shape[ragged - 1], device=values.device)
        member = torch.bucketize(row, offsets[1:], right=True).clamp(max=lengths.numel() - 1)
        inside = (row >= offsets[member]) & (row < offsets[member] + lengths[member])
        shape = [1] * values.dim()
        shape[ragged - 1] = -1
        values = torch.where(inside.view(shape), values, values.new_zeros(()))
    return torch.nested.nested_tensor_from_jagged(
        function(values),
        offsets,
        lengths,
        jagged_dim=ragged,
        min_seqlen=x._maybe_min_seqlen,
        max_seqlen=x._maybe_max_seqlen,
    )


def kernel(name: str) -> Callable[..., Any]:
    """What an operator of the namespace does with nested tensors."""
    return _fused_linear if name == "fused_linear" else _refuse(name)


def _fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    recipe: str = "tensorwise",
    *,
    input_scale: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    if not x.is_nested or weight.is_nested or (bias is not None and bias.is_nested):
        raise NotImplementedError(
            "fp8::fused_linear: expected dense weight and bias, and x dense or nested, "
            "got a nested weight or bias"
        )
    op = torch.ops.fp8.fused_linear.default
    scaling = {"input_scale": input_scale, "history": history}
    return map_rows(lambda rows: op(rows, weight, bias, recipe, **scaling), x)


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"fp8::{name}: expected dense tensors, got a nested one; fp8::fused_linear takes "
            "nested ones, of others give the rows: x.values() (jagged), torch.cat(x.unbind())"
        )

    return refuse
