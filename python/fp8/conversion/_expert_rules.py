"""Which experts modules `fp8.convert` may and does change; _rules.py has nn.Linear."""

from dataclasses import dataclass, field

from torch import nn

from ..integrations.transformers import _experts

MIN_EXPERTS_WORK = 700
"""Smallest work, in the sense of `worthwhile`, for which experts are converted.

Provisional: from the grouped matmuls alone on an H200 (16384 to 65536 rows). Mixtral-8x7B's experts
(3440) gain 1.7 times there, those of Qwen3-30B-A3B (737) 1.2 to 1.6 times, smaller ones were not
measured. How many tokens an expert gets counts as much and is not known here: a weight is
quantized once per step, so with few hundred tokens an expert FP8 needs `fp8.cached_weights`.
"""


def worthwhile(products: list[tuple[int, int]]) -> str | None:
    """None if experts with these products, (in-features, out-features) each, should train faster
    in FP8 than in bf16, else the reason.

    FP8 gains time in proportion to the sum of K·N and spends it on quantizing K + N values per
    token and product: rules.worthwhile's K·N / (K + N), of both together.

    Example:
        >>> worthwhile([(2048, 1024), (512, 2048)])  # hidden 2048, intermediate 512
        'small experts: K*N/(K+N) = 558, FP8 gains from 700'
    """
    total = sum(k + n for k, n in products)
    work = sum(k * n for k, n in products) // total if total else 0
    if work >= MIN_EXPERTS_WORK:
        return None
    return f"small experts: K*N/(K+N) = {work}, FP8 gains from {MIN_EXPERTS_WORK}"


@dataclass
class FoundExperts:
    """One experts module of a model."""

    module: nn.Module
    name: str  # as model.named_modules() has it
    aliases: list[str] = field(default_factory=list)  # further names of the same module

    def refused(self) -> str | None:
        """The safety rules; None if convert may change this module."""
        return _experts.refused(self.module)

    def unselected(self) -> str | None:
        """The default rule: why it is left alone, or None."""
        return worthwhile(_experts.products_of(self.module))

    def shape(self) -> str:
        """'8 x (4096 -> 28672, 14336 -> 4096)', or '-' where there are no such weights."""
        up = _experts.weights_of(self.module)[0]
        if getattr(up, "ndim", 0) != 3:
            return "-"
        products = ", ".join(f"{k} -> {n}" for k, n in _experts.products_of(self.module))
        return f"{up.size(0)} x ({products})"

    def numel(self) -> int:
        """Elements of both weights."""
        up, _, down, _ = _experts.weights_of(self.module)
        return sum(getattr(weight, "numel", lambda: 0)() for weight in (up, down))


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """Every experts module, once each, in the order of model.named_modules()."""
    found: dict[nn.Module, FoundExperts] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in found:
            found[module].aliases.append(name)
        elif _experts.is_experts(module):
            found[module] = FoundExperts(module, name)
    return list(found.values())
