"""Which nn.Linear modules `fp8.convert` may change (safety rules) and does change (default rules).

Every rule is a pure function that returns None or the reason, in the words that `fp8.summary`
prints. Nothing is stored in the model: reasons are found again when they are asked for, so they
survive copies, pickles and later surgery.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .linear import Linear

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

READ_PAST_FORWARD: tuple[tuple[type[nn.Module], tuple[str, ...], str], ...] = (
    (nn.MultiheadAttention, ("out_proj",), "its weight is used by F.multi_head_attention_forward"),
    (
        nn.TransformerEncoderLayer,
        ("linear1", "linear2"),
        "its weight is used by the inference fast path",
    ),
)
"""Modules of torch.nn that use a child's weight instead of calling the child, so that its class
changes nothing, or only in training. (All of torch.nn 2.11; TransformerDecoderLayer and
AdaptiveLogSoftmaxWithLoss call their children.)"""

HEAD_NAMES = frozenset({"lm_head"})
"""Last name components of output heads: their error goes straight into the loss, and they stay in
high precision."""

MIN_WORK: Mapping[str, int] = MappingProxyType(
    {"tensorwise": 800, "rowwise": 900, "rowwise_gw_hp": 900, "blockwise": 900}
)
"""Smallest K·N / (K + N), per recipe, for which `worthwhile` lets FP8 run.

From `benchmarks/bench_sizes.py` on an H100 (benchmarks/results/sizes_h100.json), forward + backward
of one layer alone, 8192 tokens, against bf16: from 1228 on FP8 is 1.11 to 1.39 times as fast, at
955 1.06 to 1.17 times, at 819 0.94 to 1.10 times. Layers at 819 are the k and v projections of
grouped-query attention, whose input is quantized for q already; tensorwise they gain from that.

Steps below about 0.3 ms are bound by the host, in bf16 too, and there FP8 takes up to 1.4 times as
long when a layer runs alone: so do most layers of this grid at 2048 tokens, those up to 1024 at
4096 tokens, and 2048 -> 2048 at 8192 (0.83 to 1.00 times as fast). What pays depends on the tokens
of a step; this rule assumes the thousands of a training step.

blockwise has rowwise's number: it was not measured over this grid.
"""


def worthwhile(in_features: int, out_features: int, recipe: str) -> str | None:
    """None if FP8 should train faster than a bf16 nn.Linear of this shape, else the reason.

    K = in_features, N = out_features. FP8 gains time in proportion to K·N per token and spends it
    on quantizing K + N values per token, so the rule is K·N / (K + N) >= MIN_WORK[recipe]: for
    square layers K >= 2·MIN_WORK, and no long side makes up for a side shorter than MIN_WORK. It
    depends on neither the device nor the number of tokens: a model developed on a CPU converts the
    same way on a GPU.

    Example:
        >>> worthwhile(4096, 256, "tensorwise")
        'small: K*N/(K+N) = 240, FP8 gains from 800'
    """
    total = in_features + out_features
    work = in_features * out_features // total if total else 0
    if work >= MIN_WORK[recipe]:
        return None
    return f"small: K*N/(K+N) = {work}, FP8 gains from {MIN_WORK[recipe]}"


@dataclass
class Found:
    """One nn.Linear (or subclass) of a model."""

    module: nn.Linear
    name: str  # as model.named_modules() has it; "" for the model itself
    aliases: list[str] = field(default_factory=list)  # further names of the same module
    reader: str | None = None  # who uses its weight without calling it

    def refused(self) -> str | None:
        """The safety rules: why convert must leave this module alone; None if it may change it."""
        module, kind = self.module, type(self.module)
        if kind not in (nn.Linear, Linear):
            return f"a subclass of nn.Linear: {kind.__name__}"
        if self.reader is not None:
            return self.reader
        if kind is nn.Linear and "forward" in vars(module):
            return "its forward was replaced on the instance; convert before that"
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            return "its weight is not a tensor"
        if weight.dtype not in DTYPES:
            return f"{dtype_name(weight)} weight; FP8 takes bfloat16, float16, float32"
        if hasattr(weight, "__tensor_flatten__") and type(weight).__name__ != "DTensor":
            return f"its weight is a tensor subclass: {type(weight).__name__}"
        return None

    def unselected(self, recipe: str) -> str | None:
        """The default rules, for want of a filter: why this module is left alone, or None."""
        for name in (self.name, *self.aliases):
            if name.rpartition(".")[2] in HEAD_NAMES:
                return "output head, kept in high precision by default"
        return worthwhile(self.module.in_features, self.module.out_features, recipe)


def find_linears(model: nn.Module) -> list[Found]:
    """Every nn.Linear, subclasses included, once each, in the order of model.named_modules()."""
    found = {
        module: Found(module, name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    for prefix, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            if not isinstance(child, nn.Linear):
                continue
            name = f"{prefix}.{child_name}" if prefix else child_name
            if name != found[child].name:
                found[child].aliases.append(name)
            for kind, children, why in READ_PAST_FORWARD:
                if isinstance(parent, kind) and child_name in children:
                    found[child].reader = f"{child_name} of a {kind.__name__}: {why}"
    return list(found.values())


def dtype_name(weight: object) -> str:
    """'bfloat16' for a bfloat16 tensor, '-' for anything else."""
    return str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else "-"
