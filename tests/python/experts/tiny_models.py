"""Small mixture-of-experts models from transformers' own classes, and what tests do with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fp8

transformers = pytest.importorskip("transformers", minversion="5.0")

SHARED = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Ten tokens and more for each expert, on average, at the sizes that the tests use.
OWN = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "intermediate_size": 96,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "intermediate_size": 96,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
}
FAMILIES = tuple(OWN)


def make(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal language model with random weights large enough that its outputs are not noise."""
    config = transformers.AutoConfig.for_model(family, **(SHARED | OWN[family]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)  # what stays as transformers draws it: gpt-oss's sinks
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * parameter.shape[-1] ** -0.5)
            elif "bias" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(device, dtype)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith(".experts")}


def only_experts(module: nn.Module, name: str) -> bool:
    """A filter for fp8.convert."""
    return name.endswith(".experts")


def tokens(batch: int = 2, length: int = 24, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, SHARED["vocab_size"], (batch, length), generator=generator).to(device)


def routing(
    count: int, top_k: int, experts: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """top_k different experts a token, and weights that add up to one."""
    scores = torch.randn(count, experts)
    values, index = scores.topk(top_k)
    return index.to(device), values.softmax(-1).to(device, dtype)


Call = tuple[Tensor, Tensor, Tensor]  # hidden_states, top_k_index, top_k_weights


def record_calls(
    model: nn.Module, run: Callable[[], object]
) -> list[tuple[nn.Module, Call, Tensor]]:
    """Of every call of an experts module during run(): the module, what it got, what it gave."""
    calls: list[tuple[nn.Module, Call, Tensor]] = []

    def note(module: nn.Module, args: Call, output: Tensor) -> None:
        calls.append((module, tuple(a.detach() for a in args), output.detach()))

    hooks = [m.register_forward_hook(note) for m in experts_of(model).values()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def eager(module: nn.Module, *args: Tensor) -> Tensor:
    """transformers' own loop over the experts, whatever implementation is chosen."""
    return type(module).forward.__wrapped__(module, *args)


def relative(actual: Tensor, expected: Tensor) -> float:
    """rms(error) / rms(expected); NaN where either has one."""
    exact = expected.detach().double()
    return float((actual.detach().double() - exact).norm() / exact.norm())


def summary_row(model: nn.Module, name: str) -> list[str]:
    """What fp8.summary says about one module: the cells behind its name."""
    lines = [line.split("  ") for line in fp8.summary(model).splitlines()]
    cells = next(line for line in lines if line[0].strip() == name)
    return [cell.strip() for cell in cells[1:] if cell.strip()]
