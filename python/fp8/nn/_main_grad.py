"""`weight.main_grad`: a buffer that the weight gradient of an fp8.Linear is added to.

The attributes are those that Megatron-LM and Transformer Engine use. With them the backward's last
matmul adds into the buffer itself: no gradient tensor, no separate addition, and a sum in fp32 over
the micro-batches where the buffer is fp32.
"""

from functools import cache, partial

import torch
from torch import Tensor

from .._native import nested

_fused_linear = torch.ops.fp8.fused_linear.default
_fused_linear_into = torch.ops.fp8._fused_linear_into.default


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
    if not isinstance(main_grad, Tensor):
        raise TypeError(
            "fp8.Linear: expected weight.main_grad to be a tensor or None, "
            f"got {type(main_grad).__name__}"
        )
    if x.is_nested:
        return nested.map_rows(
            lambda rows: linear(rows, weight, bias, recipe, main_grad, input_scale, history), x
        )
    y: Tensor
    scaling = {"input_scale": input_scale, "history": history}
    if not (weight.requires_grad and torch.is_grad_enabled()):
        y = _fused_linear(x, weight, bias, recipe, **scaling)
        return y
    overwrite = bool(getattr(weight, "overwrite_main_grad", False))
    if not hasattr(weight, "grad_added_to_main_grad"):
        y = _fused_linear_into(x, weight, bias, recipe, main_grad, overwrite, None, **scaling)
        return y
    if torch.compiler.is_compiling():  # a hook cannot be compiled: autograd gets the gradient
        y = _fused_linear(x, weight, bias, recipe, **scaling)
        return y
    stand_in = _stand_in(weight.shape, weight.dtype, weight.device)
    y = _fused_linear_into(x, weight, bias, recipe, main_grad, overwrite, stand_in, **scaling)
    assert y.grad_fn is not None  # the weight requires a gradient
    y.grad_fn.register_hook(partial(_after_backward, weight))
    return y


@cache
def _stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that autograd gets as the gradient, so that hooks on the parameter run. One per shape,
    as in Transformer Engine: autograd takes views of it, without a copy or a launch."""
    return torch.zeros(shape, dtype=dtype, device=device)


def _after_backward(
    weight: Tensor, grads: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """Hook behind the backward of a layer; grads are those of x, weight and bias."""
    if grads[1] is None:  # a backward that did not reach the weight
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if not getattr(weight, "zero_out_wgrad", False):
        return None
    # Somebody else's gradient of the same parameter is added to this one and counts.
    return (grads[0], torch.zeros_like(grads[1]), *grads[2:])
