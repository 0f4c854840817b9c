"""`weight.main_grad`: a buffer that the weight gradient of a layer is added to, of fp8.Linear,
fp8.GroupedLinear and the experts of transformers.

The attributes are those that Megatron-LM and Transformer Engine use. With them the backward's last
matmul adds into the buffer itself: no gradient tensor, no separate addition, and a sum in fp32 over
the micro-batches where the buffer is fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .._native import nested

_fused_linear = torch.ops.fp8.fused_linear.default
_fused_linear_into = torch.ops.fp8._fused_linear_into.default
_grouped_linear = torch.ops.fp8.grouped_linear.default
_grouped_linear_into = torch.ops.fp8._grouped_linear_into.default
_moe_experts = torch.ops.fp8.moe_experts.default
_moe_experts_into = torch.ops.fp8._moe_experts_into.default


@dataclass
class Target:
    """Where the gradient of one weight goes."""

    weight: Tensor  # the parameter
    main_grad: Tensor
    overwrite: bool
    stand_in: Tensor | None  # what autograd gets as the gradient, where hooks want one


def target_of(layer: str, weight: Tensor, main_grad: object) -> Target | None:
    """What the attributes of the weight ask for; None where autograd gets the gradient."""
    if not isinstance(main_grad, Tensor):
        raise TypeError(
            f"{layer}: expected weight.main_grad to be a tensor or None, "
            f"got {type(main_grad).__name__}"
        )
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return None
    overwrite = bool(getattr(weight, "overwrite_main_grad", False))
    if not hasattr(weight, "grad_added_to_main_grad"):
        return Target(weight, main_grad, overwrite, None)
    if torch.compiler.is_compiling():  # a hook cannot be compiled
        return None
    stand_in = _stand_in(weight.shape, weight.dtype, weight.device)
    return Target(weight, main_grad, overwrite, stand_in)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: str,
    main_grad: object,
    input_scale: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    """`fused_linear` whose weight gradient goes into main_grad [out_features, in_features]."""
    target = target_of("fp8.Linear", weight, main_grad)
    if x.is_nested:
        return nested.map_rows(
            lambda rows: linear(rows, weight, bias, recipe, main_grad, input_scale, history), x
        )
    y: Tensor
    scaling = {"input_scale": input_scale, "history": history}
    if target is None:
        y = _fused_linear(x, weight, bias, recipe, **scaling)
        return y
    into = (target.main_grad, target.overwrite, target.stand_in)
    y = _fused_linear_into(x, weight, bias, recipe, *into, **scaling)
    _watch(y, [(1, target)])
    return y


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    recipe: str,
    target: Target | None,
    transposed: bool = False,
) -> Tensor:
    """`grouped_linear` whose weight gradient goes where the target says, if there is one.
    transposed: the parameter, and so its buffer, has the last two dimensions of weight exchanged.
    """
    y: Tensor
    if target is None:
        y = _grouped_linear(x, weight, offsets, bias, recipe)
        return y
    main_grad, stand_in = _as_given(target, transposed)
    y = _grouped_linear_into(
        x, weight, offsets, bias, recipe, main_grad, target.overwrite, stand_in
    )
    _watch(y, [(1, target)])
    return y


def moe_experts(
    arguments: Sequence[Any], targets: Sequence[Target | None], transposed: bool
) -> Tensor:
    """The same of `moe_experts(*arguments)`, with a target of gate_up and one of down."""
    y: Tensor
    if not any(targets):
        y = _moe_experts(*arguments)
        return y
    given = [_as_given(t, transposed) if t else (None, None) for t in targets]
    main_grads, stand_ins = zip(*given, strict=True)
    overwrites = [t is not None and t.overwrite for t in targets]
    y = _moe_experts_into(*arguments, *main_grads, *overwrites, *stand_ins)
    _watch(y, [(3 + i, target) for i, target in enumerate(targets) if target])
    return y


def _as_given(target: Target, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """main_grad and stand-in in the layout of an operator's argument."""
    main_grad, stand_in = target.main_grad, target.stand_in
    if not transposed:
        return main_grad, stand_in
    return main_grad.transpose(-2, -1), stand_in if stand_in is None else stand_in.transpose(-2, -1)


@cache
def _stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that autograd gets as the gradient, so that hooks on the parameter run. One per shape,
    as in Transformer Engine: autograd takes views of it, without a copy or a launch."""
    return torch.zeros(shape, dtype=dtype, device=device)


def _watch(y: Tensor, targets: list[tuple[int, Target]]) -> None:
    """Note on the weights when their buffers were written. targets: with each one's number among
    the node's inputs."""
    for index, target in targets:
        if target.stand_in is not None:
            assert y.grad_fn is not None  # the weight requires a gradient
            y.grad_fn.register_hook(partial(_after_backward, target.weight, index))


def _after_backward(
    weight: Tensor, index: int, grads: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """Hook behind the backward of a layer; grads are those of the node's inputs."""
    found = grads[index]
    if found is None:  # a backward that did not reach the weight
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if not getattr(weight, "zero_out_wgrad", False):
        return None
    # Somebody else's gradient of the same parameter is added to this one and counts.
    return (*grads[:index], torch.zeros_like(found), *grads[index + 1 :])
