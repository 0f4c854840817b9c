"""Where the static scale of a layer lives whose weights are elsewhere between its calls.

accelerate's cpu_offload and disk_offload keep a module's parameters on the meta device and load
them from a map around each forward; with offload_buffers=True its buffers too. accelerate is not
imported: its hook is recognized by what it has.
"""

from typing import Any

import torch
from torch import Tensor, nn


def scale_device(module: nn.Module, observed: torch.device) -> torch.device:
    """Where a scale of the module belongs; `observed` if neither weight nor hook knows."""
    weight = module.weight
    if isinstance(weight, Tensor) and not weight.is_meta:
        return weight.device
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return observed


def store_scale(module: nn.Module, scale: Tensor) -> None:
    """Put the scale where the hook of an offloaded module will look for it.

    Raises RuntimeError where that cannot be written.
    """
    for hook in _hooks(module):
        if not (getattr(hook, "offload", False) and getattr(hook, "offload_buffers", False)):
            continue
        if scale.is_meta or "input_scale" in module._non_persistent_buffers_set:
            continue  # no value; not offloaded
        devices = getattr(hook, "original_devices", None)
        if isinstance(devices, dict):  # what comes back when the hook is taken off
            devices.setdefault("input_scale", torch.device("cpu"))
        store: Any = hook.weights_map
        key = "input_scale"
        while hasattr(store, "dataset") and hasattr(store, "prefix"):
            store, key = store.dataset, f"{store.prefix}{key}"
        values = getattr(store, "state_dict", store)  # those of memory go before those of disk
        try:
            values[key] = scale.detach().to("cpu")
        except TypeError as error:
            raise RuntimeError(
                "fp8.Linear: expected offloaded weights in a dict or accelerate's "
                f"OffloadedWeightsLoader, got {type(store).__name__}, into which input_scale "
                "cannot be written; calibrate before offloading, or use offload_buffers=False"
            ) from error


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module, those of a sequence each."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", (hook,))) if hook is not None else []
