"""One table of sample calls for every operator of the namespace; the generic tests (opcheck, fake
tensors, registration) run over it. A new operator gets a row in one of the tables that it is made
of, or a test fails."""

from __future__ import annotations

import samples_frozen
import samples_grouped
import samples_linear
import samples_merged
import samples_mlp
import samples_norm
import samples_quantize
import torch
from sample import Sample, Table

# fp8.cached_weights, and what Python asks once: they compute nothing, so there is nothing to trace.
STATE_OPS = {"_cache_weights", "_forget_weights", "_uncache_weights"}
STATE_OPS |= {"_recipes", "_amax_history_size"}


def namespace() -> list[str]:
    """Every operator under fp8:: that computes, private ones too, without overload names."""
    names = torch._C._dispatch_get_all_op_names()
    found = {n.split("::")[1].split(".")[0] for n in names if n.startswith("fp8::")}
    return sorted(found - STATE_OPS)


def public_namespace() -> list[str]:
    return [name for name in namespace() if not name.startswith("_")]


def samples(name: str, device: str) -> list[Sample]:
    """The samples of one operator on `device`."""
    return TABLE[name](device)


TABLE: Table = {
    **samples_quantize.TABLE,
    **samples_linear.TABLE,
    **samples_frozen.table(Sample),
    **samples_merged.table(Sample),
    **samples_mlp.TABLE,
    **samples_grouped.TABLE,
    **samples_norm.TABLE,
}
