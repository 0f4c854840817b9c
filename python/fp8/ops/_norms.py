"""Norms: RMSNorm in the forms that models have, with a residual added before, and LayerNorm."""

import torch
from torch import Tensor

_ops = torch.ops.fp8


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    form: str = "scale_then_round",
) -> Tensor:
    """RMSNorm over the last dimension: forward and backward are one pass each, differentiable once.

    With xhat = x / sqrt(mean(x²) + eps) in float32, and T the dtype of x, `form` says where the
    product with the weight is rounded:

        "scale_then_round"     y = T(weight · xhat)        F.rms_norm, OLMo 2, gpt-oss
        "round_then_scale"     y = weight · T(xhat)        Llama, Qwen, Mistral
        "scale_by_one_plus"    y = T((1 + weight) · xhat)  Gemma

    Values and gradients are rounded where these formulas round, written in eager PyTorch; only the
    order of float32 sums is another one. It depends on K alone: a row's result does not depend on
    the other rows, and is the same on CPU and GPU.

    Args:
        x: [..., K] bfloat16, float16 or float32. Leading dimensions of any strides are read where
            they lie if they can be walked by three strides, else copied.
        weight: [K] bfloat16, float16 or float32; None: 1.
        eps: None: 2^-23, as F.rms_norm.
        form: see above.

    Returns: [..., K] contiguous, in x's dtype; with "round_then_scale" in the wider one of x's and
    weight's. Gradients: dx in x's dtype, that of the weight in the weight's.

    Example:
        >>> fp8.ops.rms_norm(torch.randn(2, 8, 64), torch.ones(64), 1e-6).shape
        torch.Size([2, 8, 64])
    """
    result: Tensor = _ops.rms_norm.default(x, weight, eps, form)
    return result


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the last dimension: y = weight · (x - mean(x)) / sqrt(var(x) + eps) + bias in
    float32, rounded once to x's dtype; differentiable once.

    Sums are added in an order that depends on K alone, the same on CPU and GPU.

    Args:
        x: [..., K] bfloat16, float16 or float32; strides as in `rms_norm`.
        weight, bias: [K] bfloat16, float16 or float32; None: 1 and 0.
        eps: added to the variance.

    Returns: [..., K] contiguous, in x's dtype. Gradients in the dtypes of what they belong to. In
    torch.autocast on a GPU all are cast to float32 first, as F.layer_norm does.

    Example:
        >>> fp8.ops.layer_norm(torch.randn(8, 64), torch.ones(64), torch.zeros(64)).shape
        torch.Size([8, 64])
    """
    result: Tensor = _ops.layer_norm.default(x, weight, bias, eps)
    return result


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    form: str = "scale_then_round",
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, which is the new residual: what stands between the branches of a
    pre-norm layer, in one pass each way.

    Args:
        x, residual: [..., K] of one shape and dtype.
        weight, eps, form: as in `rms_norm`.

    Returns: y, and sum = x + residual, rounded to x's dtype before it is normed. Gradients reach x
    and residual through both; that of the sum joins dx in the same pass.

    Example:
        >>> x, residual = torch.randn(8, 64), torch.randn(8, 64)
        >>> y, residual = fp8.ops.add_rms_norm(x, residual, torch.ones(64), 1e-6)
    """
    result: tuple[Tensor, Tensor] = _ops.add_rms_norm.default(x, residual, weight, eps, form)
    return result
