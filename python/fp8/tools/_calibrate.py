"""`fp8.calibrate` and `fp8.uncalibrate`: static scales for the inputs of fp8.Linear modules.

A dynamic tensorwise scale costs a pass over the input before the one that casts it. With a scale
that is fixed beforehand the first pass goes: one launch, and for a forward without gradients 3
bytes an element instead of 5.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._native.progress import progress
from ..nn import _offload
from ..nn._linear import Linear
from ..recipe import check_recipe

ModelT = TypeVar("ModelT", bound=nn.Module)


@contextmanager
def calibrate(model: nn.Module, *, margin: float = 1.0) -> Iterator[None]:
    """Observe the inputs of every tensorwise `fp8.Linear` in the context, then fix their scales.

    Inside, the modules quantize dynamically, and each keeps the largest |x| that it was called
    with, on its device, without a synchronization. At the end `input_scale` becomes the scale that
    quantization gives an amax of margin · that: margin · amax / 448, a power of two where the
    recipe says so, and 1 where amax is 0. From then on the module quantizes its input with this
    scale: larger values saturate, Inf too, and NaN stays NaN. Weights and gradients are scaled
    dynamically as before.

    In training, layers that read one input (q, k and v) share its dynamic quantization, but not a
    static one, so the gain is that of inference.

    `input_scale` is a buffer, so it is saved with the model, and loaded into a converted model
    that was not calibrated. Modules that already have one are observed and fixed anew. In
    distributed runs each process observes its own data: reduce `layer.input_scale` afterwards
    (the maximum) where processes must agree.

    Calibrate before torch.compile: compiled code does not run the hooks that observe.

    Args:
        model: a module with fp8.Linear modules, in eval or training mode. Of recipes other than
            tensorwise they are left alone.
        margin: room for larger values than those seen, a factor on amax. Default 1.

    Warns (UserWarning) with the names of modules that were never called: they stay as they were.

    Raises TypeError for a model that is no nn.Module, ValueError for one without a tensorwise
    fp8.Linear, for a margin that is not positive and finite, and at the end, with their names, for
    modules whose inputs held NaN or Inf. Then, and where the context ends by an exception, the
    model is as it was before.

    Example:
        >>> with torch.no_grad(), fp8.calibrate(model):
        ...     for batch in batches:
        ...         model(batch)
    """
    layers = _tensorwise_layers(model)
    if not (isinstance(margin, int | float) and 0 < margin < math.inf):
        raise ValueError(f"fp8.calibrate: expected a positive, finite margin, got {margin!r}")
    before = {layer: layer.input_scale for layer in layers}
    observed: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(_observer(observed), with_kwargs=True) for layer in layers
    ]
    for layer in layers:
        layer._buffers.pop("input_scale", None)  # which stays as persistent as it was
    try:
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        scales = _scales(layers, observed, margin)
    except BaseException:
        for layer, scale in before.items():
            layer.input_scale = scale
        raise
    for layer in layers:
        layer.input_scale = scales.get(layer, before[layer])
    never = [name for layer, name in layers.items() if layer not in scales]
    if never:
        names = ", ".join(map(repr, never))
        message = f"fp8.calibrate: never called, left as they were: {names}"
        warnings.warn(message, stacklevel=3)


def uncalibrate(model: ModelT) -> ModelT:
    """Make every `fp8.Linear` of `model` scale its input dynamically again. Returns `model`.

    Removes the buffers `input_scale`, from the state_dict too.

    Raises TypeError for a model that is no nn.Module.
    """
    _check_module("uncalibrate", model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.input_scale = None
    return model


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fp8.{function}: expected a torch.nn.Module, got {type(model).__name__}")


def _tensorwise_layers(model: nn.Module) -> dict[Linear, str]:
    """Layer -> name; a layer in several places is one, under its first name."""
    _check_module("calibrate", model)
    layers = {m: name for name, m in model.named_modules() if isinstance(m, Linear)}
    chosen = {
        layer: name or "(model)"
        for layer, name in layers.items()
        if check_recipe(layer.recipe).granularity == "tensorwise"
    }
    if not chosen:
        recipes = ", ".join(sorted({repr(layer.recipe) for layer in layers}))
        raise ValueError(
            "fp8.calibrate: expected a model with an fp8.Linear of a tensorwise recipe, got "
            + (f"recipes {recipes}" if layers else "no fp8.Linear")
        )
    return chosen


def _observer(observed: dict[nn.Module, Tensor]) -> Any:
    """A forward pre-hook that keeps the running amax of its module's input."""

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
            return  # nothing to see, or for the module to refuse
        # Normal tensors, which a later call outside of inference mode may write.
        with torch.inference_mode(False), torch.no_grad():
            if module not in observed:
                observed[module] = torch.zeros((), dtype=torch.float32, device=x.device)
        with torch.no_grad():
            for part in x.detach().unbind() if x.is_nested else (x.detach(),):
                if part.numel():
                    amax = torch.linalg.vector_norm(part, math.inf, dtype=torch.float32)
                    running = observed[module]
                    torch.maximum(running, amax.to(running.device), out=running)  # NaN stays

    return observe


def _scales(
    layers: dict[Linear, str], observed: dict[nn.Module, Tensor], margin: float
) -> dict[Linear, Tensor]:
    """The scale that quantization itself computes from each amax."""
    scales = {}
    bad = []
    with torch.inference_mode(False), torch.no_grad():
        for layer, name in progress(layers.items(), "fp8.calibrate", "layer"):
            if layer not in observed:
                continue
            amax = observed[layer]
            if amax.is_meta:
                bad.append(f"{name!r} (on the meta device, without values)")
                continue
            if not bool(amax.isfinite()):
                bad.append(f"{name!r} ({amax.item()})")
                continue
            option = check_recipe(layer.recipe).power_of_two
            _, scale = torch.ops.fp8.quantize_tensorwise(
                (amax * margin).clamp(max=torch.finfo(torch.float32).max).reshape(1),
                power_of_two=option,
            )
            scales[layer] = scale.to(_offload.scale_device(layer, amax.device))
    if bad:
        raise ValueError(
            "fp8.calibrate: expected finite inputs, got NaN or Inf in those of " + ", ".join(bad)
        )
    return scales
