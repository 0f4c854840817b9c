"""The MLP of a transformer as one operator."""

import torch
from torch import Tensor

from ..recipe import Recipe

_ops = torch.ops.fp8


def mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    *,
    activation: str = "silu",
    recipe: str | Recipe = "tensorwise",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    save: str = "bf16",
    gate_second: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_history: Tensor | None = None,
    up_history: Tensor | None = None,
    down_history: Tensor | None = None,
) -> Tensor:
    """y = down(act(gate(x)) · up(x)), each a linear in FP8, differentiable once, as one node.

    What `fused_linear` and the activations of `torch.nn.functional` compute one after the other, to
    the bit, in less time and memory: h = act(gate(x)) · up(x) is quantized as it is computed, and
    so are its gradients; nothing of h is kept for the backward. One thing differs: where gate and
    up are two weights, the second product adds to the first one's dx, which is rounded once less
    than a sum of two.

    Args:
        x: [..., K] bfloat16, float16 or float32; any leading dimensions, none and empty ones
            included.
        gate: [I, K], or [2 · I, K] where gate and up are merged (the gate's half first), or the
            first weight of a plain MLP, [I, K] without up: y = down(act(gate(x))).
        up: [I, K], or None where it is merged or the MLP is plain; down's columns tell which.
        down: [H, I]. All of x's dtype (under autocast all are cast to the autocast dtype).
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu_squared", or, with a gate,
            "clamped_silu".
        recipe: as `fused_linear` takes it.
        gate_bias, up_bias, down_bias: [I] ([2 · I] where merged), [I], [H].
        save: what is kept of gate(x) and up(x) for the backward: "bf16", the products in x's dtype
            (beside x in FP8); "fp8", e4m3 codes of them with a scale for each row, in half of 16
            bits: y is the same, and the gradients are those of gate and up as the codes have them,
            each within 1/16 of itself or 2^-18 of its row's largest; or "recompute", nothing: x is
            kept, and the two products are made again from it, with the same bits.
        gate_second: the merged weight's second half is the gate.
        alpha, limit: of clamped_silu: with g = min(gate, limit) and u = clamp(up, -limit, limit),
            h = g · sigmoid(alpha · g) · (u + 1).
        gate_history, up_history, down_history: of `make_history`, for the recipe `delayed`: each
            linear's own. x is quantized once, with the gate's. Without them `delayed` is
            `tensorwise`.

    On a GPU the passes are fewest where I is a multiple of 16, no bias of gate or up wants a
    gradient, and the recipe's gradients have a scale per tensor or row in FP8 products; elsewhere
    the same values are made in more passes.

    Returns: [..., H] in x's dtype. Gradients in the dtypes of what they belong to; frozen weights
    cost nothing. A second derivative raises.

    Example:
        >>> gate, up, down = torch.randn(48, 32), torch.randn(48, 32), torch.randn(32, 48)
        >>> fp8.ops.mlp(torch.randn(2, 8, 32), gate, up, down).shape
        torch.Size([2, 8, 32])
    """
    result: Tensor = _ops.mlp.default(
        x,
        gate,
        up,
        down,
        activation=activation,
        recipe=str(recipe),
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        save=save,
        gate_second=gate_second,
        alpha=alpha,
        limit=limit,
        gate_history=gate_history,
        up_history=up_history,
        down_history=down_history,
    )
    return result
