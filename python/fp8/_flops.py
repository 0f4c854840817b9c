"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: 2 · M · N · K a product.

So as many as for the matmuls of nn.Linear, or of experts in high precision, forward and backward.
Quantizing, biases and gates count nothing, as there. The module of the counter imports triton, so
it is not imported here.
"""

from types import ModuleType
from typing import Any

import torch

from ._import_hook import when_imported

Shape = torch.Size
_ops = torch.ops.fp8

# Bits of `needs` in _moe_backward (csrc/grouped/grouped_ops.h): which gradients are wanted.
_X, _WEIGHTS, _GATE_UP, _DOWN, _GATE_UP_BIAS = 1, 2, 4, 8, 16


def install() -> None:
    """Register the formulas with the counter if its module is loaded, and when it is later."""
    when_imported("torch.utils.flop_counter", _register)


def _linear(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * weight[0]


def _linear_backward(
    dy: Shape,
    x: Shape | None,
    x_t_scale: Shape | None,
    weight: Shape | None,
    weight_amax: Shape | None,
    in_features: int,
    recipe: int,
    needs_dx: bool,
    needs_dweight: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    products = needs_dx + needs_dweight
    return 2 * dy.numel() * in_features * products


def _scaled_mm(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * a.numel() * b[0]


def _scaled_mm_accumulate(out: Shape, a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * a.numel() * b[0]


# Rows past the last offset count too: where it is, only the device knows.
def _grouped(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * weight[1]


def _grouped_backward(
    dy: Shape,
    x: Shape | None,
    x_t_scale: Shape | None,
    padded_offsets: Shape | None,
    weight: Shape | None,
    offsets: Shape,
    in_features: int,
    transposed: bool,
    recipe: int,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    **kwargs: Any,
) -> int:
    return 2 * dy.numel() * in_features * (needs_dx + needs_dweight)


def _moe(
    x: Shape, top_k_index: Shape, weights: Shape, gate_up: Shape, down: Shape, *_: Any, **__: Any
) -> int:
    return 2 * top_k_index.numel() * (_size(gate_up) + _size(down))


def _moe_backward(dy: Shape, x: Shape, top_k_index: Shape, *args: Any, **kwargs: Any) -> int:
    gate_up, down, needs = args[1], args[2], args[-1]
    dgrad_down = bool(needs & (_X | _WEIGHTS | _GATE_UP | _GATE_UP_BIAS))
    of_down = dgrad_down + bool(needs & _DOWN)
    of_gate_up = bool(needs & _X) + bool(needs & _GATE_UP)
    return 2 * top_k_index.numel() * (of_gate_up * _size(gate_up) + of_down * _size(down))


def _size(weight: Shape) -> int:
    """Elements of one expert's matrix."""
    return weight[1] * weight[2]


FORMULAS = {
    _ops.fused_linear: _linear,
    _ops._fused_linear_into: _linear,
    _ops._linear_forward: _linear,
    _ops._linear_backward: _linear_backward,
    _ops.scaled_mm: _scaled_mm,
    _ops.scaled_mm_accumulate_: _scaled_mm_accumulate,
    _ops._scaled_mm_accumulate: _scaled_mm_accumulate,
    _ops.grouped_linear: _grouped,
    _ops._grouped_forward: _grouped,
    _ops._grouped_backward: _grouped_backward,
    _ops.moe_experts: _moe,
    _ops._moe_forward: _moe,
    _ops._moe_backward: _moe_backward,
}


def _register(counter: ModuleType) -> bool:
    for op, formula in FORMULAS.items():
        if op not in counter.flop_registry:  # registering twice raises
            counter.register_flop_formula(op)(formula)
    return True
