"""Models of transformers as a user builds them, with random weights, and their steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from model_cases import ModelCase
from torch import Tensor, nn

BF16 = torch.bfloat16
VOCABULARY = 16384  # smaller than a checkpoint's, as the layers are fewer
LEARNING_RATE = 1e-4  # low enough that losses stay finite for as many steps as are timed


def causal_lm(case: ModelCase) -> nn.Module:
    """transformers' model in bf16, with the same weights in every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        case.architecture.model_type,
        **case.architecture.sizes,
        num_hidden_layers=case.layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=case.context,
        tie_word_embeddings=False,
        use_cache=False,
    )
    experts = {"experts_implementation": "grouped_mm"} if case.mixture else {}
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(
            config, dtype=BF16, attn_implementation="sdpa", **experts
        )


class OneLayer(nn.Module):
    """A model's first decoder layer, called as the model calls it."""

    def __init__(self, model: nn.Module, case: ModelCase) -> None:
        super().__init__()
        self.layer = model.model.layers[0]
        positions = torch.arange(case.context, device="cuda").unsqueeze(0)
        states = torch.empty(1, device="cuda", dtype=BF16)  # only its dtype and device are read
        self.positions = positions
        self.embeddings = model.model.rotary_emb(states, positions)

    def forward(self, x: Tensor) -> Tensor:
        """x: [sequences, context, hidden]."""
        y = self.layer(
            x,
            attention_mask=None,
            position_ids=self.positions,
            position_embeddings=self.embeddings,
        )
        return y[0] if isinstance(y, tuple) else y


def build(case: ModelCase) -> nn.Module:
    model = causal_lm(case)
    return OneLayer(model, case) if case.part == "layer" else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return [model.layer] if isinstance(model, OneLayer) else list(model.model.layers)


class Calls(NamedTuple):
    """step: the whole of it; its loss where there is one. without_optimizer: the same but for the
    optimizer, None where there is none anyway."""

    step: Callable[[], Tensor | None]
    without_optimizer: Callable[[], object] | None


Context = Callable[[], AbstractContextManager[object]]


def calls(model: nn.Module, case: ModelCase, context: Context = nullcontext) -> Calls:
    """Steps of the case. context: around each forward."""
    return (layer_calls if case.part == "layer" else training_calls)(model, case, context)


def training_calls(model: nn.Module, case: ModelCase, context: Context) -> Calls:
    """Forward with loss, backward, AdamW, zero_grad, on one batch of random tokens."""
    torch.manual_seed(1)
    size = (case.sequences, case.context)
    tokens = torch.randint(0, VOCABULARY, size, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def forward_backward() -> Tensor:
        with context():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def without_optimizer() -> None:
        forward_backward()
        optimizer.zero_grad(set_to_none=True)

    return Calls(step, without_optimizer)


def layer_calls(model: nn.Module, case: ModelCase, context: Context) -> Calls:
    """Forward + backward; weights count as new before each, as after an optimizer's step."""
    torch.manual_seed(1)
    size = (case.sequences, case.context, case.architecture.sizes["hidden_size"])
    x, dy = (torch.randn(size, device="cuda", dtype=BF16) for _ in range(2))
    x.requires_grad_()
    leaves = [x, *model.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
            torch.autograd.graph.increment_version(leaf)
        with context():
            y = model(x)
        y.backward(dy)

    return Calls(step, None)
