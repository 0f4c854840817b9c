"""Which nn.Linear modules `fp8.convert` may change (safety rules) and does change (default rules).

Every rule is a pure function that returns None or the reason, in the words that `fp8.summary`
prints. Nothing is stored in the model: reasons are found again when they are asked for, so they
survive copies, pickles and later surgery.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.transformers._experts import is_experts
from ..nn._calls import has_own_forward
from ..nn._frozen import FrozenLinear
from ..nn._frozen_experts import FrozenExperts
from ..nn._linear import Linear
from ..recipe import RECIPES, Recipe, check_recipe
from ._readers import readers

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

_MIN_WORK = {"tensorwise": 800, "rowwise": 900, "blockwise": 900}  # by granularity

MIN_WORK: Mapping[str, int] = MappingProxyType(
    {name: _MIN_WORK[recipe.granularity] for name, recipe in RECIPES.items()}
)
"""Smallest K·N / (K + N), per recipe, for which `worthwhile` lets FP8 run.

From `benchmarks/bench_sizes.py` on an H200 (benchmarks/results/sizes_h200.json), forward + backward
of one layer alone in steps that follow each other, 8192 tokens, against bf16: layers of more than 9
million elements, from 955 on, are 1.13 to 1.54 times as fast in FP8. Those of 4.2 million, at 819
and 1024, are the host's: 0.79 to 1.25 times in runs beside four hosts. At 819 are the k and v
projections of grouped-query attention: their input is quantized for q already, and among larger
layers the host is ahead. Recipes have the number of their granularity; blockwise's
is rowwise's.
"""

MIN_MEAN_SIZE = 6_000_000
"""Smallest mean K·N of the linears that pass the other rules, for which a model is converted.

A step of small layers is bound by the host, in bf16 too, and FP8 takes up to 1.4 times the host's
time. What decides is the model: a small layer among large ones costs nothing on the host, which
runs ahead of the GPU, and gains on it. Again alone, at 8192 tokens, layers of 4.2 million elements
take 0.79 to 1.25 times bf16's speed, as the host lets them (four hosts, one GPU model); those of
9.4 million gain beside all. With 4096 tokens FP8 gains from 9 to 14 million on, with 2048 from 15
to more than 17 million: what pays depends on the tokens of a step, and this rule assumes the
thousands of a training step.
"""


def worthwhile(in_features: int, out_features: int, recipe: str | Recipe) -> str | None:
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
    least = MIN_WORK[check_recipe(recipe).name]  # options cost no time
    return None if work >= least else f"small: K*N/(K+N) = {work}, FP8 gains from {least}"


@dataclass
class Found:
    """One nn.Linear (or subclass) of a model."""

    module: nn.Linear
    name: str  # as model.named_modules() has it; "" for the model itself
    aliases: list[str] = field(default_factory=list)  # further names of the same module
    reader: str | None = None  # who uses its weight without calling it
    also_read: str | None = None  # who uses its weight, where something calls it too
    routed: str | None = None  # the experts for which it chooses

    def refused(self) -> str | None:
        """The safety rules: why convert must leave this module alone; None if it may change it."""
        module, kind = self.module, type(self.module)
        if isinstance(module, FrozenLinear):
            return "frozen: its weight is FP8 already"
        if kind not in (nn.Linear, Linear):
            base = "fp8.Linear" if isinstance(module, Linear) else "nn.Linear"
            before = "; convert before fully_shard" if _is_sharded(module) else ""
            return f"a subclass of {base}: {kind.__name__}{before}"
        if self.reader is not None:
            return self.reader
        if kind is nn.Linear and has_own_forward(module):
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
        """The default rules for one module: why it is left alone, or None."""
        kept = self.exempt()
        return kept or worthwhile(self.module.in_features, self.module.out_features, recipe)

    def exempt(self) -> str | None:
        """Those of them that do not ask for sizes."""
        for name in (self.name, *self.aliases):
            if name.rpartition(".")[2] in HEAD_NAMES:
                return "output head, kept in high precision by default"
        if self.also_read is not None:
            return f"its weight is used by {self.also_read} too, past its forward"
        if self.routed is not None:
            return f"router of {self.routed}, kept in high precision by default"
        return None


def left_alone(linears: Sequence[Found], recipe: str) -> dict[nn.Linear, str]:
    """All rules, for want of a filter: which modules of a model convert leaves alone, and why."""
    reasons = {
        linear.module: reason
        for linear in linears
        if (reason := linear.refused() or linear.unselected(recipe)) is not None
    }
    rest = [linear.module for linear in linears if linear.module not in reasons]
    mean = sum(m.in_features * m.out_features for m in rest) / max(len(rest), 1)
    if mean < MIN_MEAN_SIZE:
        small = (
            f"small model: its linears average K*N = {mean / 1e6:.1f} million, "
            f"FP8 gains from {MIN_MEAN_SIZE / 1e6:.1f}"
        )
        reasons |= dict.fromkeys(rest, small)
    return reasons


def find_linears(model: nn.Module) -> list[Found]:
    """Every nn.Linear, subclasses included, once each, in the order of model.named_modules()."""
    found: dict[nn.Module, Found] = {
        module: Found(module, name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    table: dict[nn.Module, str] = {}
    for prefix, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            if not isinstance(child, nn.Linear):
                continue
            name = f"{prefix}.{child_name}" if prefix else child_name
            if name != found[child].name:
                found[child].aliases.append(name)
            for kind, children, why in READ_PAST_FORWARD:
                if isinstance(parent, kind) and child_name in children:
                    table[child] = f"{child_name} of a {kind.__name__}: {why}"
        for child_name, child in parent._modules.items():
            count = _number_of_experts(child_name, child)
            if count > 1:
                for router in _routers(parent, count):
                    found[router].routed = f"{prefix}.{child_name}" if prefix else child_name
    for module, reader in readers(model).items():
        if module not in found:
            continue
        if reader.called:
            found[module].also_read = reader.where
        else:
            found[module].reader = f"its weight is used by {reader.where} without calling it"
    for module, why in table.items():
        found[module].reader = why
    return list(found.values())


def find_conv1d(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every Conv1D of transformers, GPT-2's form of a linear layer: its weight
    is [in_features, out_features]. Imports nothing for it."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if kind is None:
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def label(found: Any) -> str:
    """The first name of a Found or FoundExperts; the others in brackets."""
    name = found.name or "(model)"
    return f"{name} [{', '.join(found.aliases)}]" if found.aliases else name


def _is_sharded(module: nn.Linear) -> bool:
    """Whether fully_shard has changed the class of an nn.Linear. Imports nothing for it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or isinstance(module, Linear):
        return False
    return isinstance(module, fsdp.FSDPModule)


def _number_of_experts(name: str, module: nn.Module | None) -> int:
    """Of a module that holds the experts of a mixture; 0 for any other."""
    if isinstance(module, nn.ModuleList):
        return len(module) if name == "experts" else 0
    known = isinstance(module, FrozenExperts) or (module is not None and is_experts(module))
    return vars(module)["num_experts"] if known else 0


def _routers(block: nn.Module, count: int) -> list[nn.Linear]:
    """Linears of a block with `count` experts that score them, or gate the shared one: children of
    the block, or of its child of that name, with an output for each expert, or a single one."""
    modules = [
        module
        for name, child in block._modules.items()
        if child is not None
        for module in (child.modules() if name == "gate" or "router" in name else [child])
    ]
    return [m for m in modules if isinstance(m, nn.Linear) and m.out_features in (1, count)]


def dtype_name(weight: object) -> str:
    """'bfloat16' for a bfloat16 tensor, '-' for anything else."""
    return str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else "-"
