"""Experts of a mixture: a tensor each in a checkpoint, one parameter of all in the model; or merged
in both, as transformers' save_pretrained leaves them in some families.

Where all of a module's are codes, and their scales go together, the module becomes an
fp8.FrozenExperts that holds them; elsewhere each is multiplied with its scale.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from ..conversion._freeze_experts import is_interleaved, unfit_experts
from ..integrations.transformers._experts import is_experts, weights_of
from ..integrations.transformers._names import EXPERT_NAMES
from ..nn._frozen_experts import WEIGHTS, FrozenExperts
from ..nn._frozen_stack import granularity_of_stack, scale_shape
from ..nn._scales import Granularity
from ._layers import CODES, FrozenWeight, frozen_weight
from ._safetensors import Entry

ALL = -1
"""The number of every expert at once."""


class Slice(NamedTuple):
    """Where one tensor of the checkpoint goes."""

    source: str  # its name
    weight: FrozenWeight | None  # where it is codes
    expert: int  # or ALL
    first: int  # row of the expert's matrix [N, K]
    transposed: bool  # the model holds [K, N]
    shape: tuple[int, int]


def slices_of(module: nn.Module, name: str, tensors: Mapping[str, Entry]) -> dict[str, list[Slice]]:
    """What the merged parameters of an experts module called `name` are made of, by the names of
    the parameters; empty if the checkpoint has neither tensors of single experts there nor codes of
    all.

    Raises ValueError for an expert that is missing, or of another shape, and for codes of all whose
    scale is missing or means nothing.
    """
    if not is_experts(module) and not isinstance(module, FrozenExperts):
        return {}
    if all(_holds_codes(tensors, f"{name}.{weight}") for weight in WEIGHTS):
        return {weight: [_merged(tensors, f"{name}.{weight}", module)] for weight in WEIGHTS}
    parts = next((n for n in EXPERT_NAMES if f"{name}.0.{n[2]}.weight" in tensors), None)
    if parts is None:
        return {}
    if is_interleaved(module):
        raise ValueError(
            f"fp8.load: '{name}.0.{parts[2]}.weight' and others are a tensor for each expert, and "
            f"the rows of gate and up alternate in {name!r}: expected {name}.gate_up_proj"
        )
    if isinstance(module, FrozenExperts):
        up, down = module.gate_up_proj, module.down_proj
        up_name, transposed = "gate_up_proj", False
    else:
        up, _, down, _ = weights_of(module)
        up_name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        transposed = bool(vars(module)["is_transposed"])
    gate_up = (parts[0], parts[1]) if up_name == "gate_up_proj" else (parts[1],)
    found: dict[str, list[Slice]] = {}
    for parameter, merged, sources in ((up_name, up, gate_up), ("down_proj", down, parts[2:])):
        experts, rows, cols = merged.shape
        if transposed:
            rows, cols = cols, rows
        shape = (rows // len(sources), cols)
        found[parameter] = [
            _slice(tensors, f"{name}.{expert}.{source}.weight", expert, i, shape, transposed)
            for expert in range(experts)
            for i, source in enumerate(sources)
        ]
    return found


def _holds_codes(tensors: Mapping[str, Entry], name: str) -> bool:
    return name in tensors and tensors[name].dtype == CODES and len(tensors[name].shape) == 3


def _merged(tensors: Mapping[str, Entry], name: str, module: nn.Module) -> Slice:
    """Codes [E, N, K] of all experts, as fp8.FrozenExperts has them."""
    shape = tensors[name].shape
    own = tuple(module._parameters[name.rpartition(".")[2]].shape)  # type: ignore[union-attr]
    if not isinstance(module, FrozenExperts) and vars(module)["is_transposed"]:
        own = (own[0], own[2], own[1])
    why = None if isinstance(module, FrozenExperts) else unfit_experts(module)
    if shape != own or why is not None:
        raise ValueError(
            f"fp8.load: {name!r}: expected codes {list(own)} for experts that can be frozen, got "
            f"{list(shape)}{f'; these cannot: {why}' if why else ''}"
        )
    scale = next((s for end in ("_scale_inv", "_scale") if (s := name + end) in tensors), None)
    if scale is None:
        raise ValueError(
            f"fp8.load: {name!r} is FP8 (F8_E4M3) and has no scale: expected {name}_scale_inv or "
            f"{name}_scale. Codes without a scale are no weights"
        )
    kind = granularity_of_stack(tensors[scale].shape, shape)
    halves = name.endswith("gate_up_proj") and not is_interleaved(module)
    if kind is None or (kind == "blockwise" and halves and shape[1] % 256):
        raise ValueError(
            f"fp8.load: {scale!r}: expected {list(scale_shape('rowwise', shape))}, or, of gate and "
            f"up in whole blocks, {list(scale_shape('blockwise', shape))}, for {name!r} "
            f"{list(shape)}, got {list(tensors[scale].shape)}"
        )
    weight = FrozenWeight(name, scale, None, kind, shape[1:])  # type: ignore[arg-type]
    return Slice(name, weight, ALL, 0, False, shape[1:])  # type: ignore[arg-type]


def _slice(
    tensors: Mapping[str, Entry],
    source: str,
    expert: int,
    place: int,
    shape: tuple[int, int],
    transposed: bool,
) -> Slice:
    if source not in tensors:
        raise ValueError(f"fp8.load: {source!r} is missing, of experts that others are there of")
    if tensors[source].shape != shape:
        raise ValueError(
            f"fp8.load: {source!r}: expected {list(shape)}, got {list(tensors[source].shape)}"
        )
    weight = frozen_weight(tensors, source) if tensors[source].dtype == CODES else None
    return Slice(source, weight, expert, place * shape[0], transposed, shape)


class ExpertsCodes(NamedTuple):
    """What a frozen experts module is made of."""

    gate_up: list[Slice]
    down: list[Slice]
    granularity: Granularity  # of both, in the module

    def slices(self) -> list[Slice]:
        """All of them."""
        return self.gate_up + self.down


def frozen_experts(module: nn.Module, slices: Mapping[str, list[Slice]]) -> ExpertsCodes | None:
    """How an experts module holds the codes of the checkpoint; None where it cannot: some are no
    codes, its gate or its widths are not those of an fp8.FrozenExperts, or scales are in blocks,
    and gate's and up's do not lie one below the other (I is no multiple of 128)."""
    if tuple(slices) != WEIGHTS:
        return None
    if not isinstance(module, FrozenExperts) and unfit_experts(module) is not None:
        return None
    gate_up, down = (slices[name] for name in WEIGHTS)
    kinds = {part.weight.granularity if part.weight else None for part in gate_up + down}
    if None in kinds:
        return None
    if kinds == {"blockwise"}:
        whole = gate_up[0].expert == ALL or gate_up[0].shape[0] % 128 == 0
        return ExpertsCodes(gate_up, down, "blockwise") if whole else None
    if "blockwise" in kinds:
        return None
    # One per tensor is one for each of its rows: gate and up have their own.
    return ExpertsCodes(gate_up, down, "rowwise")
