"""Experts of a mixture in FP8: what Hugging Face models run as experts implementation `fp8`.

transformers keeps the experts of a layer as 3-D parameters of one module and looks its forward up
by name in `transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`; _registration.py puts `forward`
there. Nothing here imports transformers or waits for the GPU: how many tokens an expert gets is
known on the device only.

    rows are sorted by expert -> gate and up projection -> gating -> down projection
    -> back to the order of the tokens -> weighted -> summed over a token's experts, in fixed order

One operator does all of it, `fp8.ops.moe_experts`, where it knows the module's gating: _gating.py.
Elsewhere `mixture` composes it of two grouped_linear and PyTorch's operators. Which modules
`fp8.convert` changes is decided in conversion/_expert_rules.py.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import _main_grad
from ...recipe import DEFAULT_GROUPED_RECIPE
from ._gating import forget_gate, gate_of, notes_of, watch

NAME = "fp8"
"""The name in transformers' registry."""

DEFAULT = "grouped_mm"
"""What transformers runs where nothing was asked for, and where FP8 cannot run."""

_SETTINGS = "fp8_settings"
_MAX_EXPERTS = 1023
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEVICES = ("cuda", "cpu", "meta")


@dataclass(frozen=True)
class Settings:
    """What convert notes on an experts module. A pickled model names this class: loading it
    registers the implementation that the module's config asks for (`__setstate__`)."""

    __module__ = "fp8.integrations.transformers"  # what pickles name

    recipe: str
    config: Any
    """The config that the module had and that revert gives back. Its implementation is what runs
    where FP8 cannot."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        from ._registration import register_if_loaded  # it imports this module

        register_if_loaded()
        vars(self).update(state)


def forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls. hidden_states: [T, H], top_k_index: [T, k] integers, top_k_weights:
    [T, k]; returns [T, H] in hidden_states' dtype.

    Ids from num_experts on are experts of other processes and contribute nothing. Where the module
    cannot run in FP8 (`refused`), its previous implementation does.
    """
    if not torch.compiler.is_compiling():
        notes_of(self).called = True
    up, up_bias, down, down_bias = weights = weights_of(self)
    if _obstacle(*weights) is not None:
        other: Tensor = _previous(self)(self, hidden_states, top_k_index, top_k_weights)
        return other
    x = hidden_states
    if x.dtype != up.dtype and not torch.is_autocast_enabled(up.device.type):
        x = x.to(up.dtype)  # as transformers does: a norm in fp32, say
    targets = [_target(weight) for weight in (up, down)]
    turned = bool(self.is_transposed)
    if turned:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    recipe = recipe_of(self)
    gate = gate_of(self) if _in_sixteens(down) else None
    y: Tensor
    if gate is not None:
        if torch.compiler.is_compiling():
            watch(self, x.new_empty((0, up.size(1))))
        index = top_k_index.to(torch.int64)
        given = (x, index, top_k_weights, up, down, up_bias, down_bias, *gate, recipe)
        y = _main_grad.moe_experts(given, targets, turned)
    else:
        function: Any = self._apply_gate if getattr(self, "has_gate", True) else self.act_fn
        y = mixture(
            x, top_k_index, top_k_weights, up, down, up_bias, down_bias, function, recipe,
            targets, turned,
        )  # fmt: skip
    return y.to(hidden_states.dtype)


def _target(weight: Tensor) -> _main_grad.Target | None:
    """Its main_grad, where it has one that the backward writes."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return None
    return _main_grad.target_of("fp8 experts", weight, main_grad)


def mixture(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Callable[[Tensor], Tensor],
    recipe: str,
    targets: Sequence[_main_grad.Target | None] = (None, None),
    transposed: bool = False,
) -> Tensor:
    """y[t] = sum over t's choices c of weight[t, c] * down_e(gate(up_e(x[t]))), e = index[t, c].

    x: [T, H], top_k_index and top_k_weights: [T, k], up: [E, N, H], down: [E, H, I], biases [E, N]
    and [E, H]; gate maps [rows, N] to [rows, I]. Returns [T, H], in the wider of the dtypes of x
    and top_k_weights. targets: main_grads of up and down; transposed: stored the other way.
    """
    tokens, top_k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1).to(torch.int32), stable=True)
    # Where each expert's rows end. Those of other processes sort behind the last offset.
    groups = torch.arange(up.size(0), dtype=torch.int32, device=x.device)
    offsets = torch.searchsorted(experts, groups, out_int32=True, right=True)
    rows = torch.arange(order.numel(), device=x.device)
    place = torch.empty_like(order).scatter_(0, order, rows)  # where each choice went

    of_up, of_down = targets
    linear = _main_grad.grouped_linear
    rows_of_x = _rows(x, order, place, top_k)
    gate_up = linear(rows_of_x, up, offsets, up_bias, recipe, of_up, transposed)
    h = gate(gate_up).to(gate_up.dtype)
    y = _rows(linear(h, down, offsets, down_bias, recipe, of_down, transposed), place, order)
    weighted: Tensor = y.view(tokens, top_k, y.size(1)) * top_k_weights.unsqueeze(-1)
    return weighted.sum(1)


def _rows(x: Tensor, index: Tensor, back: Tensor, copies: int = 1) -> Tensor:
    rows: Tensor = _Rows.apply(x, index, back, copies)  # type: ignore[no-untyped-call]
    return rows


class _Rows(torch.autograd.Function):
    """Row r is x[index[r] // copies], each row of x being taken `copies` times. Its gradient sums
    its copies in order: what autograd does by itself, adding in whatever order threads arrive, is
    neither deterministic nor fast. back is the inverse permutation of index."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, index // copies if copies > 1 else index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        rows = grad.index_select(0, back)
        if ctx.copies > 1:
            rows = rows.view(back.numel() // ctx.copies, ctx.copies, grad.size(1)).sum(1)
        return rows, None, None, None


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' use_experts_implementation made the class of the module."""
    have = vars(module)
    return (
        "is_transposed" in have
        and "has_bias" in have
        and hasattr(have.get("config"), "_experts_implementation_internal")
        and "num_experts" in have
        and hasattr(type(module).forward, "__wrapped__")
    )


def weights_of(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """gate_up_proj (or up_proj), its bias, down_proj and its bias, as the module stores them."""
    parameters = module._parameters
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    names = (up, f"{up}_bias", "down_proj", "down_proj_bias")
    if all(name in parameters for name in names[::2]):
        found = [parameters.get(name) for name in names]
    else:  # parametrized, or plain attributes
        found = [getattr(module, name, None) for name in names]
    if not module.has_bias:
        found[1] = found[3] = None
    return tuple(found)  # type: ignore[return-value]


def refused(module: nn.Module) -> str | None:
    """Why this experts module cannot run in FP8, or None."""
    return _obstacle(*weights_of(module))


def _obstacle(
    up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None
) -> str | None:
    for weight in (up, down):
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return "its weights are not 3-D tensors"
        if weight.dtype not in _DTYPES:
            name = str(weight.dtype).removeprefix("torch.")
            return f"{name} weights; FP8 takes bfloat16, float16, float32"
        if hasattr(weight, "__tensor_flatten__") and type(weight).__name__ != "DTensor":
            return f"its weights are a tensor subclass: {type(weight).__name__}"
    for other in (down, up_bias, down_bias):
        if other is not None and other.dtype != up.dtype:
            return "its weights differ in dtype"
    if up.size(0) > _MAX_EXPERTS:
        return f"{up.size(0)} experts; FP8 takes up to {_MAX_EXPERTS}"
    if up.device.type not in _DEVICES:
        return f"on {up.device.type}; FP8 runs on CUDA and CPU"
    return None


def unfused(module: nn.Module) -> str | None:
    """Why the passes around its two products are not fused, or None."""
    if not _in_sixteens(weights_of(module)[2]):
        return "extents that are not multiples of 16"
    if gate_of(module) is not None:
        return None
    return "a gating of its own" if getattr(module, "has_gate", True) else "no gate"


def _in_sixteens(down: Tensor) -> bool:
    """Whether both widths, that of the hidden states and that inside an expert, are multiples."""
    return down.size(1) % 16 == down.size(2) % 16 == 0


def products_of(module: nn.Module) -> list[tuple[int, int]]:
    """(in-features, out-features) of an expert's two products."""
    up, _, down, _ = weights_of(module)
    shapes = [(int(w.size(1)), int(w.size(2))) for w in (up, down)]
    return [shape if module.is_transposed else (shape[1], shape[0]) for shape in shapes]


def in_fp8(module: nn.Module) -> bool:
    """Whether it is an experts module whose implementation is `fp8`, however that was chosen."""
    return is_experts(module) and vars(module)["config"]._experts_implementation_internal == NAME


def recipe_of(module: nn.Module) -> str:
    """Its recipe; without fp8.convert, the default."""
    settings = vars(module).get(_SETTINGS)
    return settings.recipe if settings is not None else DEFAULT_GROUPED_RECIPE


def fp8_configs(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """For set_fp8: a copy of every config that these modules have (without FP8), by its identity,
    whose implementation is `fp8`. The implementation is an attribute of a config that all layers
    share, and maybe other models: the modules get a config of their own, those of one call share
    it."""
    copies: dict[int, Any] = {}
    for module in modules:
        config = _plain_config(module)
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            copies[id(config)]._experts_implementation_internal = NAME
    return copies


def set_fp8(module: nn.Module, recipe: str, configs: dict[int, Any]) -> None:
    """Make one experts module run `fp8`, with its config out of fp8_configs."""
    config = _plain_config(module)
    vars(module)["config"] = configs[id(config)]
    vars(module)[_SETTINGS] = Settings(recipe, config)
    gate_of(module)  # found now, not within a compiled or captured forward


def _plain_config(module: nn.Module) -> Any:
    settings = vars(module).get(_SETTINGS)
    return settings.config if settings is not None else vars(module)["config"]


def unset_fp8(module: nn.Module) -> None:
    """Give it back the implementation that it had before set_fp8, or transformers' default."""
    drop_settings(module)
    if in_fp8(module):  # chosen by set_experts_implementation: there is nothing to go back to
        vars(module)["config"]._experts_implementation_internal = DEFAULT


def drop_settings(module: nn.Module) -> None:
    """Takes back what set_fp8 noted, and nothing that other modules share."""
    forget_gate(module)
    settings = vars(module).pop(_SETTINGS, None)
    if settings is not None:
        vars(module)["config"] = settings.config


def fallback_name(module: nn.Module) -> str:
    """The implementation that runs where FP8 cannot."""
    settings = vars(module).get(_SETTINGS)
    name = settings.config._experts_implementation_internal if settings is not None else None
    return DEFAULT if name is None or name == NAME else str(name)


def _previous(module: nn.Module) -> Callable[..., Tensor]:
    """The forward that the module would have without FP8."""
    functions = sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS
    eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    found: Callable[..., Tensor] = functions.get_interface(fallback_name(module), eager)
    return found
