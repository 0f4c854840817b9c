"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: 2 · M · N · K a product.

So as many as for the matmuls of nn.Linear, or of experts in high precision, forward and backward.
Quantizing, biases and gates count nothing, as there. The counter's registry gets the formulas when
a counter first meets one of the operators: `import fp8` changes nothing there, and its module,
which imports triton, is not imported.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Shape = torch.Size
_ops = torch.ops.fp8
_COUNTER = "torch.utils.flop_counter"

# Bits of `needs` in _moe_backward (csrc/torch/grouped/grouped_ops.h): which gradients are wanted.
_X, _WEIGHTS, _GATE_UP, _DOWN, _GATE_UP_BIAS = 1, 2, 4, 8, 16


def install() -> None:
    """Have the formulas registered when a counter meets one of the operators: it asks an operator
    that it does not know to decompose itself. Harmless to repeat."""
    for op in FORMULAS:
        original = op.default.decompose
        if getattr(original, "func", None) is not _decompose:
            op.default.decompose = partial(  # type: ignore[method-assign]
                _decompose, original
            )


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


def _merged(x: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    features = sum(int(weight[0]) for weight in weights)
    return 2 * int(x.numel()) * features


def _merged_backward(dys: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    in_features, _, needs_dx, needs_dweight = args[4:8]
    elements = sum(
        int(dy.numel() * (needs_dx + (needs_dweight >> i & 1))) for i, dy in enumerate(dys)
    )
    return 2 * int(in_features) * elements


def _scaled_mm(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * a.numel() * b[0]


def _scaled_mm_accumulate(out: Shape, a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * a.numel() * b[0]


# Rows and columns past the last offset count too: where it is, only the device knows.
def _grouped_mm(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * a.numel() * b[-2]


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


def _mlp(x: Shape, gate: Shape, up: Shape | None, down: Shape, *_: Any, **__: Any) -> int:
    rows: int = math.prod(x[:-1])
    return 2 * rows * sum(weight.numel() for weight in (gate, up, down) if weight is not None)


# Bits of `needs` in _mlp_backward (csrc/torch/mlp/mlp.h), by layer: what its products are for.
def _mlp_backward(dy: Shape, *args: Any, **kwargs: Any) -> int:
    in_features, features, form, needs = *args[16:19], args[-1]
    x, gate, up, down, gate_bias, up_bias, _, recompute = (bool(needs >> i & 1) for i in range(8))
    rows: int = math.prod(dy[:-1])
    inner: int = in_features * features
    to_h = x or gate or up or gate_bias or up_bias
    layers = {0: (gate,), 1: (gate, up), 2: (gate, gate)}[form]
    again = recompute and (to_h or down)
    of_layers = sum(x + wgrad + again for wgrad in layers)
    of_down: int = dy[-1] * features * (to_h + down)
    return 2 * rows * (inner * of_layers + of_down)


def _experts_frozen(
    x: Shape, top_k_index: Shape, weights: Shape, gate_up: Shape, *args: Any, **kwargs: Any
) -> int:
    return 2 * top_k_index.numel() * (_size(gate_up) + _size(args[1]))


def _experts_frozen_backward(dy: Shape, top_k_index: Shape, *args: Any, **kwargs: Any) -> int:
    gate_up, down, needs = args[1], args[3], args[-1]
    of_down = bool(needs & (_X | _WEIGHTS | _GATE_UP_BIAS))
    return 2 * top_k_index.numel() * (bool(needs & _X) * _size(gate_up) + of_down * _size(down))


def _size(weight: Shape) -> int:
    """Elements of one expert's matrix."""
    return weight[1] * weight[2]


def _frozen_backward(dy: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * dy.numel() * weight[1]


FORMULAS = {
    _ops.fused_linear: _linear,
    _ops._fused_linear_into: _linear,
    _ops._fused_linear_functional: _linear,
    _ops._linear_forward: _linear,
    _ops._linear_backward: _linear_backward,
    _ops.linear_frozen: _linear,
    _ops._linear_frozen_backward: _frozen_backward,
    _ops.scaled_mm: _scaled_mm,
    _ops.scaled_mm_accumulate_: _scaled_mm_accumulate,
    _ops._scaled_mm_accumulate: _scaled_mm_accumulate,
    _ops.grouped_mm: _grouped_mm,
    _ops.grouped_linear: _grouped,
    _ops._grouped_linear_into: _grouped,
    _ops._grouped_forward: _grouped,
    _ops._grouped_backward: _grouped_backward,
    _ops.moe_experts: _moe,
    _ops._moe_experts_into: _moe,
    _ops._moe_forward: _moe,
    _ops._moe_backward: _moe_backward,
    _ops.experts_frozen: _experts_frozen,
    _ops._experts_frozen_forward: _experts_frozen,
    _ops._experts_frozen_backward: _experts_frozen_backward,
    _ops.merged_linear: _merged,
    _ops._merged_linear_functional: _merged,
    _ops._merged_forward: _merged,
    _ops._merged_backward: _merged_backward,
    _ops.mlp: _mlp,
    _ops._mlp_forward: _mlp,
    _ops._mlp_backward: _mlp_backward,
}


def _register() -> bool:
    """Whether the module of the counter is loaded."""
    if sys.modules.get(_COUNTER) is None:
        return False
    counter = importlib.import_module(_COUNTER)  # waits if another thread is in the middle of it
    for op, formula in FORMULAS.items():
        if op not in counter.flop_registry:  # registering twice raises
            counter.register_flop_formula(op)(formula)
    return True


def _decompose(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """OpOverload.decompose of an operator, called within the mode that asks."""
    if _register():
        # A counter copied the registry when it was made.
        counter = getattr(_get_current_dispatch_mode(), "counter", None)
        known = getattr(counter, "flop_registry", None)
        if known is not None:
            registered = sys.modules[_COUNTER].flop_registry
            known.update({op: registered[op] for op in FORMULAS if op not in known})
    return original(*args, **kwargs)
