"""Experts of a mixture: a tensor each in a checkpoint, one parameter of all in the model.

Where all of a module's are codes, and their scales go together, the module becomes an
fp8.FrozenExperts that holds them; elsewhere each is multiplied with its scale.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from ..conversion._freeze_experts import unfit_experts
from ..integrations.transformers._experts import is_experts, weights_of
from ..nn._frozen_experts import WEIGHTS, FrozenExperts
from ..nn._scales import Granularity
from ._layers import CODES, FrozenWeight, frozen_weight
from ._safetensors import Entry

_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Of gate, up and down, in checkpoints."""


class Slice(NamedTuple):
    """Where one tensor of the checkpoint goes."""

    source: str  # its name
    weight: FrozenWeight | None  # where it is codes
    expert: int
    first: int  # row of the expert's matrix [N, K]
    transposed: bool  # the model holds [K, N]
    shape: tuple[int, int]


def slices_of(module: nn.Module, name: str, tensors: Mapping[str, Entry]) -> dict[str, list[Slice]]:
    """What the merged parameters of an experts module called `name` are made of, by the names of
    the parameters; empty if the checkpoint has no tensors of single experts there.

    Raises ValueError for an expert that is missing, or of another shape.
    """
    if not is_experts(module) and not isinstance(module, FrozenExperts):
        return {}
    parts = next((n for n in _NAMES if f"{name}.0.{n[2]}.weight" in tensors), None)
    if parts is None:
        return {}
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
        whole = gate_up[0].shape[0] % 128 == 0
        return ExpertsCodes(gate_up, down, "blockwise") if whole else None
    if "blockwise" in kinds:
        return None
    # One per tensor is one for each of its rows: gate and up have their own.
    return ExpertsCodes(gate_up, down, "rowwise")
