"""Static scales through torch.distributed.checkpoint, into layers that have none yet.

That module reads only what the given state_dict has, and the state_dict of a layer that was not
calibrated has no `input_scale`: the scale of a calibrated model would stay behind in silence. So
once such a layer has made a state_dict, loading reads, beside its weight, the scale that the
checkpoint has for it. It goes

- into the layer, if the tensor that was loaded into is the layer's own, since then the weight has
  arrived too, and
- to whichever layer loads this state_dict later (`scale_beside`).

Nothing is added to a state_dict, nothing is asked for that the checkpoint does not have, and
tensors of other modules stay what they are.
"""

import functools
import importlib
import re
import sys
import weakref
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from ._linear import Linear

MODULE = "torch.distributed.checkpoint.default_planner"
SCALE = "input_scale"

# Keys are the weights of state_dicts, never parameters: those must stay without weak references.
_made_by: Any = WeakTensorKeyDictionary()  # -> weak reference to the layer
_scales: Any = WeakTensorKeyDictionary()  # -> _Read

# What wrappers of modules put into names and torch.distributed.checkpoint takes out.
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")


class _Read(NamedTuple):
    name: str  # of the weight in the checkpoint
    scale: Tensor  # [] float32, on the CPU


def made_without_scale(layer: "Linear", weight: object) -> None:
    """A layer that could have a scale, and has none, put `weight` into a state_dict."""
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
        _made_by[weight] = weakref.ref(layer)
        if dist.is_available():
            # Imported here, since who imports it later may load into this state_dict.
            _wrap(importlib.import_module(MODULE))


def scale_beside(weight: object, name: str) -> Tensor | None:
    """The scale that was read for this weight of a state_dict, called `name`; None: there is none.

    With full_state_dict=True, set_model_state_dict makes DTensors of what was read. Those are not
    known, so the name and the shape must do: of tensors that are still there, and for DTensors.
    """
    if not isinstance(weight, Tensor) or isinstance(weight, nn.Parameter):
        return None
    read = _scales.get(weight)
    if read is None and len(_scales) and _is_dtensor(weight):
        clean = _WRAPPERS.sub("", name)
        for whole, candidate in list(_scales.items()):
            same_name = candidate.name == clean or candidate.name.endswith(f".{clean}")
            if same_name and whole.shape == weight.shape and not _is_dtensor(whole):
                read = candidate
    return None if read is None else read.scale


def _is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _wrap(planner_module: ModuleType) -> None:
    """Have DefaultLoadPlanner, and what derives from it, read scales too."""
    planner = planner_module.DefaultLoadPlanner
    original = planner.set_up_planner
    if hasattr(original, "_reads_scales"):
        return

    @functools.wraps(original)
    def set_up_planner(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        original(self, state_dict, *args, **kwargs)
        _ask_for_scales(self)

    set_up_planner._reads_scales = True  # type: ignore[attr-defined]
    planner.set_up_planner = set_up_planner


class _Reading:
    """Stands for a planner's commit_tensor, which is called with each tensor that was read."""

    def __init__(self, commit: Any) -> None:
        self.commit = commit
        self.wanted: dict[str, tuple[str, Tensor, Tensor]] = {}

    def __call__(self, read_item: Any, tensor: Tensor) -> None:
        self.commit(read_item, tensor)
        wanted = self.wanted.pop(read_item.dest_index.fqn, None)
        if wanted is not None:
            _arrive(*wanted)


def _ask_for_scales(planner: Any) -> None:
    """Have the planner read the scales that lie beside the weights it reads."""
    for tensor in planner.state_dict.values() if len(_scales) else ():
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
            _scales.pop(tensor, None)  # of another checkpoint
    stored = getattr(planner.metadata, "state_dict_metadata", {})
    wanted = {}
    for name, entry in stored.items():
        prefix, _, last = name.rpartition(".")
        weight = f"{prefix}.weight" if prefix else "weight"
        loaded = planner.state_dict.get(weight)
        if last != SCALE or name in planner.state_dict or not isinstance(loaded, Tensor):
            continue
        if not _is_scale(entry) or isinstance(loaded, nn.Parameter):
            continue
        scale = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        wanted[name] = (weight, scale, loaded)
    reading = vars(planner).get("commit_tensor")
    if not isinstance(reading, _Reading):
        if not wanted:
            return
        reading = _Reading(planner.commit_tensor)
        planner.commit_tensor = reading
    reading.wanted = wanted
    for name, (_, scale, _) in wanted.items():
        planner.state_dict[name] = scale


def _is_scale(entry: Any) -> bool:
    if not hasattr(entry, "properties"):  # no tensor
        return False
    return bool(entry.size.numel() == 1 and entry.properties.dtype.is_floating_point)


def _arrive(name: str, scale: Tensor, weight: Tensor) -> None:
    """The scale was read beside `weight`, a tensor of the state_dict that is loaded into."""
    scale = scale.detach().reshape(()).float()
    _scales[weight] = _Read(name, scale)
    reference = _made_by.get(weight)
    layer = reference() if reference is not None else None
    if layer is not None:
        layer._take_scale(scale)
