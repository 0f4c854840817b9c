"""What transformers calls the tensors of a checkpoint in its models, where that differs."""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Of gate, up and down of an expert, in checkpoints."""


def renaming_of(model: nn.Module) -> Callable[[str], str] | None:
    """From names in a checkpoint to those in a model of transformers: `block_sparse_moe` to `mlp`
    in Mixtral, prefixes of vision models. None for other models. Imports transformers for no other
    model."""
    conversions = _conversions_of(model)
    if conversions is None:
        return None
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def rename(name: str) -> str:
        new, _ = rename_source_key(name, renamings, [], prefix, state)
        if new not in state and name in state:
            new = name
        return str(new)

    return rename


def merging_of(model: nn.Module) -> Callable[[str], str]:
    """From the name of an expert's tensor to that of the parameter into which transformers merges
    it while it loads a model of its own; the name itself where it does not."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = _conversions_of(model) or []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def merged(name: str) -> str:
        return str(rename_source_key(name, renamings, converters, prefix, state)[0])

    return merged


def expert_names_of(model: nn.Module) -> tuple[str, str, str]:
    """What checkpoints of a model call gate, up and down of an expert: w1, w3 and w2 in Mixtral's
    family."""
    patterns = [
        pattern
        for entry in _conversions_of(model) or []
        for pattern in getattr(entry, "source_patterns", ())
    ]
    others = any(".w1." in str(pattern).replace("\\", "") for pattern in patterns)
    return EXPERT_NAMES[1] if others else EXPERT_NAMES[0]


def _conversions_of(model: nn.Module) -> list[Any] | None:
    """None for a model that is not transformers'."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions: list[Any] = get_model_conversion_mapping(model)
    return conversions
