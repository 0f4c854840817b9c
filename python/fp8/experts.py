"""Mixtures of experts of Hugging Face transformers, without a dependency on it.

Transformers keeps a layer's experts as 3-D parameters of one module and looks its forward up by the
name in `config._experts_implementation`. Here is the function with the name `fp8`. It is registered
when transformers' table of such functions exists: at once if it was imported before fp8, else by a
finder that waits for that one module and changes nothing else.

An experts module runs in one of three ways:
- fused, `fp8.ops.moe_experts`: the gate is one that the operator knows. What a module's
  `_apply_gate` computes is compared with the operator's gates on a few numbers, so a custom gate is
  never taken for another.
- composed of two `fp8.ops.grouped_linear` around the module's own gate, for any other.
- as before, in high precision, where the weights cannot be taken. `fp8.summary` says why.
"""

import functools
import importlib.abc
import importlib.machinery
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .rules import DTYPES, dtype_name

NAME = "fp8"
"""In transformers' table of experts functions, and in `config._experts_implementation`."""

_TABLE = "transformers.integrations.moe"

RECIPE_OF: dict[str, str] = {
    "tensorwise": "rowwise",
    "rowwise": "rowwise",
    "rowwise_gw_hp": "rowwise_gw_hp",
}
"""The grouped recipe of experts for each recipe of linear layers that `fp8.convert` is given."""

DEFAULT_RECIPE = "rowwise"
"""Of experts modules that `set_experts_implementation("fp8")` alone has changed."""

# Names of attributes that are set on an experts module.
_RECIPE = "fp8_recipe"  # a grouped recipe, or None: the module was left out
_BEFORE = "fp8_implementation_before"
_GATE = "fp8_gate"


class Gate(NamedTuple):
    """How `fp8.ops.moe_experts` computes a module's gate."""

    activation: str
    interleaved: bool
    alpha: float = 1.702
    limit: float = 7.0


# --- which modules, and how they run ---


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' decorator has made this module's forward one that is looked up."""
    marks = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return all(hasattr(module, mark) for mark in marks) and hasattr(
        getattr(module, "config", None), "_experts_implementation"
    )


def weights_of(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The first and the second product's weights as stored, or None where there are none."""
    first = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    second = getattr(module, "down_proj", None)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first, second
    return None


def refused(module: nn.Module) -> str | None:
    """Why the experts of this module stay in high precision; None if they can run in FP8."""
    weights = weights_of(module)
    if weights is None:
        return "its weights are not two tensors"
    for weight in weights:
        if weight.dim() != 3:
            return f"weights of {weight.dim()} dimensions, not one matrix an expert"
        if weight.dtype not in DTYPES:
            return f"{dtype_name(weight)} weights; FP8 takes bfloat16, float16, float32"
        if hasattr(weight, "__tensor_flatten__") and type(weight).__name__ != "DTensor":
            return f"its weights are tensor subclasses: {type(weight).__name__}"
        if weight.shape[0] > 1023:
            return f"{weight.shape[0]} experts; a grouped product takes at most 1023"
    return None


def composed(module: nn.Module) -> str | None:
    """Why the gate runs between two grouped products instead of inside one operator, or None."""
    weights = weights_of(module)
    if not module.has_gate:
        return "no gate"
    if gate_of(module) is None:
        return "a custom gate"
    if weights is not None and any(extent % 16 for w in weights for extent in w.shape[1:]):
        return "extents that are no multiples of 16"
    return None


def gate_of(module: nn.Module) -> Gate | None:
    """The operator's gate that computes what the module's `_apply_gate` does; None if there is
    none. Found once a module."""
    if _GATE not in vars(module):
        vars(module)[_GATE] = _find_gate(module)
    gate: Gate | None = vars(module)[_GATE]
    return gate


def _find_gate(module: nn.Module) -> Gate | None:
    # Both halves reach well beyond any clamp in use, and every pair is different.
    gate_up = torch.cat([torch.linspace(-9, 11, 64), torch.linspace(12, -10, 64)]).reshape(1, 128)
    try:
        with torch.no_grad():
            wanted = module._apply_gate(gate_up.clone())  # type: ignore[operator]
    except Exception:  # a gate that cannot be tried is a custom one
        return None
    if not isinstance(wanted, Tensor) or wanted.shape != (1, 64):
        return None
    alpha = _number(module, ("alpha", "swiglu_alpha"), 1.702)
    limit = _number(module, ("limit", "swiglu_limit"), 7.0)
    for interleaved in (False, True):
        gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, -1)
        clamped = gate.clamp(max=limit)
        candidates = {
            "silu": nn.functional.silu(gate) * up,
            "gelu": nn.functional.gelu(gate) * up,
            "gelu_tanh": nn.functional.gelu(gate, approximate="tanh") * up,
            "clamped_silu": clamped
            * torch.sigmoid(alpha * clamped)
            * (up.clamp(-limit, limit) + 1),
        }
        for activation, values in candidates.items():
            if torch.allclose(wanted, values, rtol=1e-5, atol=1e-6):
                return Gate(activation, interleaved, alpha, limit)
    return None


def _number(module: nn.Module, names: Sequence[str], default: float) -> float:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return default


# --- the function that transformers calls ---

_Biases = tuple[Tensor | None, Tensor | None]


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for `experts_implementation="fp8"`.

    Args:
        module: the experts module.
        hidden_states: [T, H].
        top_k_index: [T, k], experts; those outside [0, experts) contribute nothing.
        top_k_weights: [T, k].

    Returns: [T, H] in hidden_states' dtype.
    """
    recipe = getattr(module, _RECIPE, DEFAULT_RECIPE)
    if recipe is None or refused(module) is not None:
        return _as_before(module)(module, hidden_states, top_k_index, top_k_weights)
    weights = weights_of(module)
    assert weights is not None  # refused() has looked
    first, second = weights
    biases: _Biases = (None, None)
    if module.has_bias:
        name = "gate_up_proj_bias" if module.has_gate else "up_proj_bias"
        biases = (getattr(module, name), module.down_proj_bias)  # type: ignore[assignment]
    if module.is_transposed:
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    x = hidden_states if hidden_states.dtype == first.dtype else hidden_states.to(first.dtype)
    run = _composed_forward if composed(module) else _fused_forward
    y = run(module, x, top_k_index.long(), top_k_weights, first, second, biases, recipe)
    return y.to(hidden_states.dtype)


def _fused_forward(
    module: nn.Module,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: _Biases,
    recipe: str,
) -> Tensor:
    gate = gate_of(module)
    assert gate is not None  # composed() has looked
    y: Tensor = torch.ops.fp8.moe_experts.default(
        x,
        index,
        weights,
        gate_up,
        down,
        *biases,
        gate.activation,
        gate.interleaved,
        gate.alpha,
        gate.limit,
        recipe,
    )
    return y


def _composed_forward(
    module: nn.Module,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    biases: _Biases,
    recipe: str,
) -> Tensor:
    tokens, choices = index.shape
    experts, order = index.reshape(-1).sort(stable=True)
    ends = torch.arange(1, up.shape[0] + 1, device=x.device)
    offsets = torch.searchsorted(experts, ends).int()
    grouped_linear = torch.ops.fp8.grouped_linear.default
    rows = grouped_linear(x[order // choices], up, offsets, biases[0], recipe)
    act: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn  # type: ignore[assignment]
    rows = grouped_linear(act(rows), down, offsets, biases[1], recipe)
    weighted = rows * weights.reshape(-1)[order].unsqueeze(-1)
    # Back to the order of tokens by a gather: deterministic, as the sum over choices is.
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=x.device)
    y: Tensor = weighted[place].view(tokens, choices, -1).sum(1)
    return y


def _as_before(module: nn.Module) -> Callable[..., Tensor]:
    """The implementation that the module had before fp8, or transformers' default."""
    before = getattr(module, _BEFORE, None) or "grouped_mm"
    table = sys.modules.get(_TABLE)
    eager = getattr(type(module).forward, "__wrapped__", None)
    if table is not None and before != "eager" and before in table.ALL_EXPERTS_FUNCTIONS:
        found: Callable[..., Tensor] = table.ALL_EXPERTS_FUNCTIONS[before]
        return found
    if eager is None:
        raise RuntimeError(f"fp8: {type(module).__name__} has no experts forward to fall back to")
    return eager  # type: ignore[no-any-return]


# --- convert, revert, summary ---


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every experts module, once each."""
    return [(name, module) for name, module in model.named_modules() if is_experts(module)]


def convert_experts(
    model: nn.Module, recipe: str, selected: Callable[[nn.Module, str], bool] | None
) -> Callable[[], int]:
    """Chooses now, changes when the result is called, which returns how many run in FP8.

    The implementation is a property of a config that layers share; which of them really run in FP8
    is a property of the modules.
    """
    found = find_experts(model)
    chosen = {
        module
        for name, module in found
        if refused(module) is None and (selected is None or selected(module, name))
    }

    def apply() -> int:
        if not chosen:
            return 0
        for _, module in found:
            before = module.config._experts_implementation  # type: ignore[union-attr]
            if before != NAME:
                vars(module)[_BEFORE] = before
            vars(module)[_RECIPE] = RECIPE_OF[recipe] if module in chosen else None
        for _, module in found:
            module.config._experts_implementation_internal = NAME  # type: ignore[union-attr]
            if module in chosen:
                gate_of(module)  # now, not inside a compiled or captured forward
        return len(chosen)

    return apply


def revert_experts(model: nn.Module) -> None:
    """Gives the configs back the implementation that convert found."""
    found = find_experts(model)
    for _, module in found:
        vars(module).pop(_RECIPE, None)
        vars(module).pop(_GATE, None)
        before = vars(module).pop(_BEFORE, None)
        if module.config._experts_implementation == NAME and before != NAME:  # type: ignore[union-attr]
            module.config._experts_implementation_internal = before or "grouped_mm"  # type: ignore[union-attr]


def runs_in_fp8(module: nn.Module) -> bool:
    """Whether this experts module's forward is FP8's now."""
    return (
        module.config._experts_implementation == NAME  # type: ignore[union-attr]
        and getattr(module, _RECIPE, DEFAULT_RECIPE) is not None
        and refused(module) is None
    )


def cacheable_weights(model: nn.Module) -> list[Tensor]:
    """Weights of experts that run in FP8, for `fp8.cached_weights`."""
    return [
        weight
        for _, module in find_experts(model)
        if runs_in_fp8(module)
        for weight in weights_of(module) or ()
    ]


def summary_rows(model: nn.Module) -> tuple[list[tuple[str, str, str, str]], str | None]:
    """A row like those of linear layers for each experts module, and a line of totals."""
    rows, elements, in_fp8 = [], 0, 0
    found = find_experts(model)
    for name, module in found:
        weights = weights_of(module)
        size = sum(weight.numel() for weight in weights or ())
        elements += size
        shape, dtype = "-", "-"
        if weights is not None:
            experts, *stored = weights[0].shape
            out_in = stored[::-1] if module.is_transposed else stored
            shape = f"{experts} x {out_in[-1]} -> {out_in[0]}"
            dtype = dtype_name(weights[0])
        if runs_in_fp8(module):
            in_fp8 += size
            why = composed(module)
            status = getattr(module, _RECIPE, DEFAULT_RECIPE)
            status += f" (experts, composed: {why})" if why else " (experts)"
        else:
            status = f"- ({refused(module) or 'not converted'})"
        rows.append((name or "(model)", shape, dtype, status))
    if not found:
        return rows, None
    count = sum(runs_in_fp8(module) for _, module in found)
    share = 100 * in_fp8 / max(elements, 1)
    return rows, (
        f"{len(found)} experts modules: {count} in FP8, {len(found) - count} left alone; "
        f"{share:.1f}% of their weight elements in FP8"
    )


# --- registration ---


def register(table: ModuleType) -> None:
    """Puts `experts_forward` into transformers' table under the name fp8."""
    table.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


class _WaitForTable(importlib.abc.MetaPathFinder):
    """Lets the other finders find transformers' module, and registers after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: Any = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        execute = getattr(spec.loader, "exec_module", None)
        if execute is not None:

            @functools.wraps(execute)
            def exec_module(module: ModuleType) -> None:
                execute(module)
                register(module)

            # On this loader object only: its class stays as it is.
            spec.loader.exec_module = exec_module
        return spec  # type: ignore[no-any-return]


def register_when_loaded() -> None:
    """Registers now if transformers' table exists, else as soon as it is imported."""
    table = sys.modules.get(_TABLE)
    if table is not None and hasattr(table, "ALL_EXPERTS_FUNCTIONS"):
        register(table)
    elif not any(type(finder).__name__ == _WaitForTable.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForTable())
