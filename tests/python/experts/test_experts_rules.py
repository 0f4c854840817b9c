"""Which experts modules fp8.convert takes by default, and which linears are routers."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import FAMILIES, experts_of, make, summary_row, transformers
from torch import nn

import fp8
from fp8.conversion import _expert_rules as expert_rules
from fp8.conversion import _rules as rules
from fp8.integrations.transformers import _experts as experts


def large(family: str, **sizes) -> nn.Module:
    config = transformers.AutoConfig.for_model(family, num_hidden_layers=1, **sizes)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_default_rules_of_mixtral():
    """Its own size. Attention and experts are converted, the head and the norms are not."""
    model = large("mixtral", hidden_size=4096, intermediate_size=14336, num_local_experts=8)
    fp8.convert(model)
    shape = "8 x (4096 -> 28672, 14336 -> 4096)"
    assert summary_row(model, "model.layers.0.mlp.experts") == [shape, "bfloat16", "rowwise"]
    assert summary_row(model, "model.layers.0.self_attn.q_proj")[-1] == "tensorwise"
    assert summary_row(model, "lm_head")[-1].startswith("- (output head")


@pytest.mark.parametrize(
    ("hidden", "inner", "gains"),
    [(4096, 14336, True), (2048, 768, True), (7168, 2048, True), (1024, 512, False)],
)
def test_default_rules_of_experts_sizes(hidden, inner, gains):
    model = large(
        "qwen3_moe", hidden_size=hidden, moe_intermediate_size=inner, num_experts=16, head_dim=128
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing was converted
        fp8.convert(model)
    name = "model.layers.0.mlp.experts"
    assert experts.in_fp8(experts_of(model)[name]) == gains
    if not gains:
        why = f"K*N/(K+N) = 438, FP8 gains from {expert_rules.MIN_EXPERTS_WORK}"
        assert summary_row(model, name)[-1] == f"- (small experts: {why})"


def test_worthwhile_begins_at_its_constant():
    side = 2 * expert_rules.MIN_EXPERTS_WORK
    assert expert_rules.worthwhile([(side, side)] * 2) is None
    assert expert_rules.worthwhile([(side, side), (side, side - 2)]) is not None
    assert expert_rules.worthwhile([]) is not None


# --- routers ---


class Block(nn.Module):
    """A block as models write it: a router that is an nn.Linear, a gate of the shared expert."""

    def __init__(self, held: nn.Module, hidden: int, count: int):
        super().__init__()
        self.experts = held
        self.router = nn.Linear(hidden, count, bias=False)
        self.shared_expert_gate = nn.Linear(hidden, 1)
        self.shared = nn.Linear(hidden, hidden)
        self.gate = nn.Sequential(nn.Linear(hidden, hidden), nn.Linear(hidden, count))
        self.attention = nn.Sequential(nn.Linear(hidden, count))  # as many outputs, no router


def routers(model):
    return {f.name: f.routed for f in rules.find_linears(model) if f.routed is not None}


def expected_routers(prefix):
    return {
        f"{prefix}router": f"{prefix}experts",
        f"{prefix}shared_expert_gate": f"{prefix}experts",
        f"{prefix}gate.1": f"{prefix}experts",
    }


def test_routers_are_found_beside_experts_modules():
    held = next(iter(experts_of(make("mixtral")).values()))
    assert routers(nn.ModuleDict({"mlp": Block(held, 64, 4)})) == expected_routers("mlp.")


def test_routers_are_found_beside_a_list_of_experts():
    """The older form, in and outside transformers: a ModuleList of MLPs."""
    held = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    assert routers(Block(held, 64, 4)) == expected_routers("")


def test_routers_stay_in_high_precision_by_rule_and_a_filter_may_take_them():
    """Sizes at which no other rule speaks against them."""
    with torch.device("meta"):
        held = nn.ModuleList(nn.Linear(4096, 4096) for _ in range(2048))
        model = Block(held, 4096, 2048)
    fp8.convert(model)
    assert type(model.shared) is fp8.Linear
    assert type(model.router) is nn.Linear
    assert (
        summary_row(model, "router")[-1]
        == "- (router of experts, kept in high precision by default)"
    )
    fp8.convert(model, filter=lambda module, name: name == "router")
    assert type(model.router) is fp8.Linear


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_of_transformers_models_are_never_converted(family):
    """By any filter even: they are modules of their own with a weight, or linears that the default
    rules name."""
    model = make(family)
    named = routers(model)
    fp8.convert(model, filter=lambda module, name: name not in named)
    for name, module in model.named_modules():
        if "router" in name or name.endswith(".gate"):
            assert not isinstance(module, fp8.Linear), name
    expected = make(family)
    assert torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("family", "own", "names"),
    [
        ("jamba", {"num_experts": 8}, {"model.layers.1.feed_forward.router"}),
        (
            "qwen2_moe",
            {"num_experts": 8},
            {f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)},
        ),
        (
            "gemma4_text",
            {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2},
            {f"model.layers.{i}.router.proj" for i in (0, 1)},
        ),
    ],
)
def test_routers_that_are_linears_in_transformers(family, own, names):
    sizes = {"num_hidden_layers": 2, "moe_intermediate_size": 32, "use_mamba_kernels": False}
    config = transformers.AutoConfig.for_model(family, **sizes, **own)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert set(routers(model)) == names
    for name in names:
        assert summary_row(model, name)[-1].startswith("- (router of model.layers.")
