"""Llamas with LoRA: over frozen layers, and over nn.Linear layers that hold the same numbers."""

from __future__ import annotations

import copy
import math
import warnings

import peft
import torch
from tiny_transformers import make
from torch import Tensor, nn

import fp8

RECIPES = ("tensorwise", "rowwise", "blockwise", "rowwise:power_of_two")


def frozen(recipe: str = "rowwise", dtype: torch.dtype = torch.float32) -> nn.Module:
    return fp8.freeze(make("llama", dtype), recipe)


def thawed(model: nn.Module) -> nn.Module:
    """A copy whose frozen layers are nn.Linear with the numbers that the codes stand for."""
    model = copy.deepcopy(model)
    for name, layer in layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        if layer.bias is not None:
            linear.bias = layer.bias
        model.set_submodule(name, linear)
    return model


def layers(model: nn.Module) -> dict[str, fp8.FrozenLinear]:
    found = {n: m for n, m in model.named_modules() if type(m) is fp8.FrozenLinear}
    assert found
    return found


def lora(**options: object) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**(settings | options))


def adapted(model: nn.Module, config: peft.LoraConfig, **options: object) -> nn.Module:
    """get_peft_model, and adapters that count: they begin as zeros."""
    if any(isinstance(m, fp8.FrozenLinear) for m in model.modules()):
        config = fp8.integrations.peft.register(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return filled(peft.get_peft_model(model, config, **options))


@torch.no_grad()
def filled(model: nn.Module, adapter: str = "default", seed: int = 11) -> nn.Module:
    """Adapters whose product is a third of a weight: values that are the same each time."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            size = (0.3 if "lora_B" in name else 1) * p.shape[-1] ** -0.5
            p.copy_(size * torch.randn(p.shape, generator=generator))
    return model


def loras(model: nn.Module) -> list[nn.Module]:
    found = [m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.Linear)]
    assert found
    return found


def decibels(actual: Tensor, expected: Tensor) -> float:
    """Power of what is expected over that of the error."""
    exact = expected.detach().double()
    error = float((actual.detach().double() - exact).norm())
    return 20 * math.log10(float(exact.norm()) / error) if error else math.inf
