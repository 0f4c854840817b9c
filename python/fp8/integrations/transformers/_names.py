"""What transformers calls the tensors of a checkpoint in its models, where that differs."""

import sys
from collections.abc import Callable

from torch import nn


def renaming_of(model: nn.Module) -> Callable[[str], str] | None:
    """From names in a checkpoint to those in a model of transformers: `block_sparse_moe` to `mlp`
    in Mixtral, prefixes of vision models. None for other models. Imports transformers for no other
    model."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def rename(name: str) -> str:
        new, _ = rename_source_key(name, renamings, [], prefix, state)
        if new not in state and name in state:
            new = name
        return str(new)

    return rename
