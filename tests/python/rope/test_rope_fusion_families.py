"""Small models of transformers whose rotary position embedding fp8.convert fused: logits and every
gradient have the bits of the same model without that fusion."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from family_sizes import HEADS, SIZES
from reference import assert_same_bits
from rope_modules import calls_of, is_fused

import fp8

transformers = pytest.importorskip("transformers", minversion="5.0")

GPTJ = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
DEEPSEEK = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
HALVES, PAIRS = "rope, halves", "rope, interleaved"
FAMILIES = {
    "llama": (SIZES, HALVES),
    "mistral": (SIZES, HALVES),
    "qwen3": (SIZES, HALVES),
    "gemma": (SIZES, HALVES),
    "phi3": (SIZES, HALVES),
    "olmo2": (SIZES, HALVES),
    "nemotron": (SIZES, HALVES),
    "gpt_neox": (HEADS, HALVES),
    "falcon": (HEADS, HALVES),
    "modernbert": (HEADS, HALVES),
    "gpt_oss": (SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}, HALVES),
    "glm": (SIZES, PAIRS),
    "glm4": (SIZES, PAIRS),
    "cohere": (SIZES, PAIRS),
    "ernie4_5": (SIZES, PAIRS),
    "gptj": (GPTJ | {"rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2}, PAIRS),
    "deepseek_v3": (SIZES | DEEPSEEK, "rope, halves, interleaved_to_halves"),
}
CALLS = {"gptj": 4}  # of two layers: q and k apart


def make(family, **more):
    auto = transformers.AutoModelForCausalLM
    if family == "modernbert":
        auto = transformers.AutoModelForMaskedLM
    settings = {"use_cache": False} | FAMILIES[family][0] | more
    config = transformers.AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = auto.from_config(config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def convert(model, fuse):
    return fp8.convert(model, filter=lambda *_: True, fuse=fuse)


def step(model, device="cpu"):
    tokens = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3)).to(device)
    logits = model(input_ids=tokens).logits
    (100 * logits.float().square().mean()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


def assert_same_step(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_same_bits(value, theirs[name], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_the_same_bits(monkeypatch, family):
    check_family(monkeypatch, family, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "glm", "cohere", "olmo2"])
def test_family_has_the_same_bits_on_a_gpu(monkeypatch, family):
    """With eager attention, whose gradients have the same bits each time."""
    check_family(monkeypatch, family, "cuda", attn_implementation="eager")


def check_family(monkeypatch, family, device, **more):
    plain = make(family, **more).to(device, torch.bfloat16)
    fused = convert(copy.deepcopy(plain), {"rope"})
    convert(plain, False)
    lines = fp8.summary(fused).splitlines()
    assert sum(line.endswith(f"fused: {FAMILIES[family][1]}") for line in lines) == 2
    assert "2 rope fused" in lines
    seen = calls_of(monkeypatch)
    ours = step(fused, device)
    assert len(seen) == CALLS.get(family, 2)
    assert_same_step(ours, step(plain, device))
    assert len(seen) == CALLS.get(family, 2)  # none of the other model


@pytest.mark.parametrize("family", ["llama", "phi3", "glm"])
def test_family_under_autocast_has_the_same_bits(monkeypatch, device, family):
    """Weights and angles in float32, q and k in bfloat16: the results are in float32."""
    plain = make(family, attn_implementation="eager").to(device)
    fused = convert(copy.deepcopy(plain), {"rope"})
    convert(plain, False)
    seen = calls_of(monkeypatch)
    with torch.autocast(device, torch.bfloat16):
        ours = step(fused, device)
        assert [q.dtype for q in seen] == 2 * [torch.bfloat16]
        assert_same_step(ours, step(plain, device))


@pytest.mark.parametrize("family", ["llama4_text", "deepseek_v2"])
def test_rotations_of_another_kind_are_left_alone(family):
    more = DEEPSEEK if family == "deepseek_v2" else {"num_local_experts": 2}
    FAMILIES.setdefault(family, (SIZES | more, None))
    model = torch.nn.ModuleList([make("llama"), make(family)])
    convert(model, {"rope"})
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    assert fused == ["0.model.layers.0.self_attn", "0.model.layers.1.self_attn"]
    reason = "- (not fused: apply_rotary_emb computes no rotation that is known)"
    lines = [line for line in fp8.summary(model).splitlines() if line.endswith(reason)]
    assert [line.split()[0] for line in lines] == [
        "1.model.layers.0.self_attn",
        "1.model.layers.1.self_attn",
    ]


def test_modules_of_the_same_class_elsewhere_keep_theirs(monkeypatch):
    plain, other = make("llama"), make("llama")
    file = sys.modules[type(plain).__module__]
    forward, function = file.LlamaAttention.forward, file.apply_rotary_pos_emb
    convert(plain, True)
    assert file.LlamaAttention.forward is forward
    assert file.apply_rotary_pos_emb is function
    seen = calls_of(monkeypatch)
    step(other)
    assert not seen
    step(plain)
    assert len(seen) == 2
    fp8.revert(plain)
    assert all(type(m).forward.__module__ == type(m).__module__ for m in plain.model.layers)
    step(plain)
    assert len(seen) == 2


def test_what_liger_does_is_respected(monkeypatch):
    """It puts its function into the file, for every model in the process."""
    model = convert(make("llama"), {"rope"})
    file = sys.modules[type(model).__module__]
    seen, called, function = calls_of(monkeypatch), [], file.apply_rotary_pos_emb

    def ligers(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        called.append(q)
        return function(q, k, cos, sin, unsqueeze_dim)

    monkeypatch.setattr(file, "apply_rotary_pos_emb", ligers)
    step(model)
    assert (len(called), len(seen)) == (2, 0)
