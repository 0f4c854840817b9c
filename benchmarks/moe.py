"""Experts modules of transformers' own classes with random weights, routings, and the ways of
running them: what bench_moe.py compares."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from runs import import_fp8

import_fp8()


class MoeShape(NamedTuple):
    model: str
    experts: int
    hidden: int
    features: int
    top_k: int
    tokens: int


SHAPES = (
    MoeShape("Mixtral 8x7B", 8, 4096, 14336, 2, 8192),
    MoeShape("Qwen3-30B-A3B", 128, 2048, 768, 8, 32768),
    MoeShape("Qwen3-30B-A3B", 128, 2048, 768, 8, 4096),
)
SMALL = MoeShape("small", 8, 256, 256, 2, 16)  # where the GPU has nothing to do

BF16 = "bf16 grouped_mm"
TORCHAO = "torchao prototype"


class Problem(NamedTuple):
    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    dy: torch.Tensor


def experts(shape: MoeShape) -> torch.nn.Module:
    """transformers' MixtralExperts of these extents, bf16 on the GPU."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.features,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device("meta"):
        module = MixtralExperts(config).to(torch.bfloat16)
    module = module.to_empty(device="cuda")
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return module


def problem(shape: MoeShape, even: bool) -> Problem:
    """even: every expert gets the same number of rows; else a random router's."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    logits = torch.randn(shape.tokens, shape.experts, device="cuda")
    weights, index = logits.softmax(-1).topk(shape.top_k)
    if even:
        order = torch.randperm(shape.tokens, device="cuda") * shape.top_k
        index = (order.unsqueeze(1) + torch.arange(shape.top_k, device="cuda")) % shape.experts
    x = torch.randn(shape.tokens, shape.hidden, **options)
    weights = (weights / weights.sum(-1, keepdim=True)).bfloat16()
    return Problem(x, index, weights, torch.randn_like(x))


@contextmanager
def running(module: torch.nn.Module, variant: str) -> Iterator[None]:
    """Inside, the module's forward is the variant's. Changes a few attributes: no host time."""
    config = module.config
    before = config._experts_implementation
    config._experts_implementation_internal = "fp8" if variant.startswith("fp8") else "grouped_mm"
    if variant.startswith("fp8"):
        vars(module)["fp8_recipe"] = variant.removeprefix("fp8 ").removesuffix(", cached weights")
    try:
        if variant == TORCHAO:
            with torchao_products():
                yield
        else:
            yield
    finally:
        config._experts_implementation_internal = before


@contextmanager
def torchao_products() -> Iterator[None]:
    """transformers' grouped_mm with its products made by torchao's prototype."""
    from transformers.integrations import moe

    product = torchao_product()
    kept = moe._grouped_mm
    moe._grouped_mm = lambda x, weight, offs: product(x, weight, offs)
    try:
        yield
    finally:
        moe._grouped_mm = kept


def torchao_product() -> Callable[..., torch.Tensor]:
    """Raises ImportError where no torchao has it."""
    for module in (
        "torchao.prototype.moe_training.fp8_grouped_mm",
        "torchao.prototype.moe_training",
        "torchao.prototype.fp8_grouped_mm",
        "torchao.prototype.moe_training.scaled_grouped_mm",
    ):
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        if hasattr(found, "_to_fp8_rowwise_then_scaled_grouped_mm"):
            return found._to_fp8_rowwise_then_scaled_grouped_mm
    raise ImportError("no torchao with _to_fp8_rowwise_then_scaled_grouped_mm")


def exact(module: torch.nn.Module, p: Problem, tokens: int) -> torch.Tensor:
    """The first tokens' output in fp64, an expert at a time."""
    x, y = p.x[:tokens].double(), torch.zeros_like(p.x[:tokens], dtype=torch.double)
    for e in p.index[:tokens].unique().tolist():
        token, choice = torch.where(p.index[:tokens] == e)
        gate, up = (x[token] @ module.gate_up_proj[e].double().t()).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ module.down_proj[e].double().t()
        y.index_add_(0, token, out * p.weights[token, choice, None].double())
    return y.detach()
