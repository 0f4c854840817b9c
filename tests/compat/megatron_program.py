"""A GPT of Megatron-Core, tensor parallel on the CPU: see test_megatron.py."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from two_processes import answer, join

import fp8

RECIPES = ("tensorwise", "rowwise", "rowwise_gw_hp", "blockwise")


class Attention(nn.Module):
    """Megatron's own allocates on the GPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [s, b, h, d] -> [b, h, s, d]
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.permute(2, 0, 1, 3).flatten(2)


def configuration(size: int) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=size,
    )


def spec() -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    made = get_gpt_layer_local_spec()
    made.submodules.self_attention.submodules.core_attention = Attention
    return made


def make(text: str, recipe: str | None, size: int) -> nn.Module:
    """By the snippet of the page; without a recipe, by its last line alone."""
    from megatron.core.models.gpt import GPTModel

    space = {"fp8": fp8, "GPTModel": GPTModel, "config": configuration(size)}
    space |= {"spec": spec(), "get_gpt_layer_local_spec": spec}
    torch.manual_seed(3)
    lines = text.replace('"rowwise"', repr(recipe)).splitlines()
    exec("\n".join(lines[-1:] if recipe is None else lines), space)
    return space["model"]


def train(model: nn.Module, main_grad: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of two micro-batches."""
    with_buffers = [
        p for n, p in model.named_parameters() if main_grad and ".linear_" in n and p.dim() == 2
    ]
    for p in with_buffers:
        p.main_grad, p.grad_added_to_main_grad = torch.zeros_like(p), False
    total = 0.0
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 96, (2, 16), generator=generator)
        positions = torch.arange(16).expand(2, -1)
        mask = torch.ones(1, 1, 16, 16).triu(1) > 0
        loss = model(ids, positions, mask, labels=ids).mean()
        loss.backward()
        total += float(loss.detach())
    assert all(p.grad_added_to_main_grad for p in with_buffers)
    return total, {n: getattr(p, "main_grad", p.grad) for n, p in model.named_parameters()}


def main() -> None:
    warnings.simplefilter("ignore")
    rank = join()
    from megatron.core import parallel_state
    from test_integrations_page import snippet

    text = snippet("Megatron-Core")
    results: dict[str, Any] = {}
    for size in (1, 2):
        parallel_state.initialize_model_parallel(size, 1)
        model = make(text, None, size)
        results[f"exact {size}"] = train(model)
        state = {name: v for name, v in model.state_dict().items() if isinstance(v, Tensor)}
        for recipe in RECIPES if size == 2 else RECIPES[:1]:
            model = make(text, recipe, size)
            ours = {name: v for name, v in model.state_dict().items() if isinstance(v, Tensor)}
            assert list(ours) == list(state)
            assert all(torch.equal(ours[name], value) for name, value in state.items())
            names = {type(m).__name__ for m in model.modules() if hasattr(m, "recipe")}
            assert names == {"ColumnParallelLinear", "RowParallelLinear"}
            results[f"{recipe} {size}"] = train(model)
        results[f"main_grad {size}"] = train(make(text, RECIPES[0], size), main_grad=True)
        parallel_state.destroy_model_parallel()
    assert rank == torch.distributed.get_rank()
    answer(results)


if __name__ == "__main__":
    main()
