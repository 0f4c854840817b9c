"""What goes where, decided from the headers and the model before anything is read or changed."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion._freeze import shared_weights
from ..conversion._readers import dtype_readers
from ..conversion._rules import find_linears
from ..nn._calls import has_own_forward
from ..nn._frozen import FrozenLinear
from ..nn._frozen_experts import FrozenExperts
from ..nn._linear import Linear
from ..nn._scales import go_together
from ._experts_plan import ExpertsCodes, Slice, frozen_experts, slices_of
from ._folder import Checkpoint
from ._layers import CODES, FrozenWeight, frozen_weight, names_of_codes, packed, passed_over, refuse

_HIGH = ("F64", "F32", "F16", "BF16")


class Target:
    """A parameter or buffer of the model, with all the places that have it."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.places: list[tuple[dict[str, Any], str]] = []

    def get(self) -> Tensor:
        """What is there now."""
        container, name = self.places[0]
        return container[name]  # type: ignore[no-any-return]

    def set(self, values: Tensor, device: torch.device) -> None:
        """Write `values`; where the tensor is on the meta device, a new one on `device`."""
        old = self.get()
        if not old.is_meta:
            old.copy_(values)
            return
        new = values.to(device, self.dtype, copy=True)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for container, name in self.places:
            container[name] = new


@dataclass
class Plan:
    """Everything that `load` does."""

    frozen: dict[nn.Linear, FrozenWeight] = field(default_factory=dict)
    frozen_experts: dict[nn.Module, ExpertsCodes] = field(default_factory=dict)
    names: dict[nn.Module, str] = field(default_factory=dict)
    copied: dict[Target, str] = field(default_factory=dict)
    dequantized: dict[str, tuple[Target, FrozenWeight]] = field(default_factory=dict)
    experts: dict[str, tuple[Target, list[Slice]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def make_plan(
    model: nn.Module, checkpoint: Checkpoint, strict: bool, skeleton: bool = False
) -> Plan:
    """Decides, or raises; see `load`. skeleton: of a model whose buffers somebody else makes."""
    tensors = checkpoint.tensors
    plan, used = Plan(), set[str]()
    _plan_frozen(model, checkpoint, plan, used)
    slices: dict[str, list[Slice]] = {}
    shared = shared_weights(model)
    for prefix, module in model.named_modules():
        own = slices_of(module, prefix, tensors)
        codes = frozen_experts(module, own) if own and module not in shared else None
        if codes is not None:
            plan.frozen_experts[module], plan.names[module] = codes, prefix
            for part in codes.slices():
                used |= _used_by(part.weight)  # type: ignore[arg-type]
        elif own and isinstance(module, FrozenExperts):
            raise ValueError(
                f"fp8.load: the experts of {prefix!r} are in high precision, or scaled in a way "
                "that frozen ones cannot have: load into the model as it was, and call "
                "fp8.freeze(model) then"
            )
        else:
            slices |= {f"{prefix}.{name}" if prefix else name: p for name, p in own.items()}
    for target, names in _targets(model, [*plan.frozen, *plan.frozen_experts]).items():
        found = next((name for name in names if name in tensors), None)
        if found is not None:
            _check_shape(found, tensors[found].shape, target.shape)
            _plan_one(checkpoint, plan, target, found, used)
            used.update(name for name in names if name in tensors)
        elif names[0] in slices:
            parts = slices[names[0]]
            refuse(tensors, (part.source for part in parts))
            plan.experts[names[0]] = target, parts
            for part in parts:
                used |= {part.source} if part.weight is None else _used_by(part.weight)
        else:
            prefix = names[0].rpartition(".")[0]
            if (other := packed(tensors, prefix)) is not None:
                how = checkpoint.quantization.get("quant_method", "another format")
                raise NotImplementedError(
                    f"fp8.load: {other!r} ({tensors[other].dtype}) holds the weight of {prefix!r} "
                    f"in {how}, which is not FP8; take the checkpoint in FP8 or high precision"
                )
            plan.missing.append(names[0])
    left = [name for name in tensors if name not in used]
    plan.passed_over = [name for name in left if passed_over(name)]
    plan.unexpected = [name for name in left if not passed_over(name)]
    if not skeleton:
        _check_meta(model)
    if strict and (plan.missing or plan.unexpected):
        raise ValueError(
            f"fp8.load: {checkpoint.path} and the model do not fit: "
            f"{_some(plan.missing, 'missing')}{_some(plan.unexpected, 'unexpected')}"
            "strict=False leaves them out; rename= maps names"
        )
    return plan


def _plan_frozen(model: nn.Module, checkpoint: Checkpoint, plan: Plan, used: set[str]) -> None:
    """The linear layers whose weight is codes in the checkpoint."""
    tensors = checkpoint.tensors
    others = shared_weights(model) | dtype_readers(model)
    for found in find_linears(model):
        module = found.module
        plan.names[module] = found.name
        if type(module) not in (nn.Linear, Linear, FrozenLinear) or found.reader is not None:
            continue
        if has_own_forward(module) or module in others or "weight" not in module._parameters:
            continue
        names = [n for prefix in (found.name, *found.aliases) for n in names_of_codes(prefix)]
        codes = next((n for n in names if n in tensors and tensors[n].dtype == CODES), None)
        if codes is None:
            continue
        weight = frozen_weight(tensors, codes)
        _check_shape(codes, weight.shape, (module.out_features, module.in_features))
        how = checkpoint.inputs.get(codes.rpartition(".")[0])
        if how is not None and not go_together(weight.granularity, how[0]):
            raise ValueError(
                f"fp8.load: {codes!r} is scaled {weight.granularity}, and the files' metadata says "
                f"{how[0]} of its input: blocks go with blocks"
            )
        plan.frozen[module] = weight
        used |= _used_by(weight)


def _plan_one(
    checkpoint: Checkpoint, plan: Plan, target: Target, name: str, used: set[str]
) -> None:
    tensors = checkpoint.tensors
    refuse(tensors, [name])
    dtype = tensors[name].dtype
    if target.dtype is torch.float8_e4m3fn:
        raise ValueError(
            f"fp8.load: {name!r} is in {dtype}, for a layer that is frozen: load into the model in "
            "high precision, and call fp8.freeze(model) then"
        )
    if dtype == CODES:
        weight = frozen_weight(tensors, name)
        plan.dequantized[name] = target, weight
        used |= _used_by(weight)
    elif (dtype in _HIGH) == target.dtype.is_floating_point and "F8" not in dtype:
        plan.copied[target] = name
    else:
        method = checkpoint.quantization.get("quant_method")
        made = f" by {method!r}" if method else ""
        own = str(target.dtype).removeprefix("torch.")
        raise NotImplementedError(
            f"fp8.load: {name!r} is in {dtype}{made}, for {own} in the model; read are F8_E4M3 "
            "with scales and high precision"
        )


def _targets(model: nn.Module, frozen: Collection[nn.Module]) -> dict[Target, list[str]]:
    """Every parameter and persistent buffer with its names, but for what becomes of codes."""
    found: dict[int, tuple[Target, list[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own: set[str] = set()
        if module in frozen:
            own = {"weight", "input_scale", "amax_history"}
            if isinstance(module, FrozenLinear):
                own |= {module.scale_name, module.input_scale_name}
            elif isinstance(module, FrozenExperts):
                own = {n for n in module._parameters if not n.endswith("_bias")}
            elif not isinstance(module, nn.Linear):
                own = {"gate_up_proj", "down_proj"}
        passing = module._non_persistent_buffers_set
        parts: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for container in parts:
            for name, tensor in container.items():
                if tensor is None or name in own or name in passing:
                    continue
                target, names = found.setdefault(id(tensor), (Target(tensor), []))
                names.append(f"{prefix}.{name}" if prefix else name)
                if not any(place[0] is container and place[1] == name for place in target.places):
                    target.places.append((container, name))
    return dict(found.values())


def _used_by(weight: FrozenWeight) -> set[str]:
    return {weight.codes, weight.scale} | ({weight.input_scale} if weight.input_scale else set())


def _check_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(got) != tuple(expected):
        raise ValueError(
            f"fp8.load: {name!r}: expected {list(expected)}, as the model has it, got {list(got)}"
        )


def _check_meta(model: nn.Module) -> None:
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                raise ValueError(
                    f"fp8.load: the buffer {f'{prefix}.{name}'!r} is on the meta device and in no "
                    "checkpoint: make the model with its buffers on a real device (accelerate's "
                    "init_empty_weights leaves them there)"
                )


def _some(names: list[str], what: str) -> str:
    if not names:
        return ""
    shown = ", ".join(map(repr, names[:5])) + (", .." if len(names) > 5 else "")
    return f"{len(names)} {what} ({shown}); "
