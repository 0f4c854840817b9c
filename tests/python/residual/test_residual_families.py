"""Small models of transformers whose residual streams fp8.convert fused: logits and every gradient
have the bits of the same model without that fusion, however it is run."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from family_sizes import HEADS, SIZES
from reference import assert_same_bits
from residual_layers import Calls, is_fused
from torch.profiler import ProfilerActivity, profile

import fp8

transformers = pytest.importorskip("transformers", minversion="5.0")

OTHERS = {"norms", "rope", "mlp", "siblings"}
SEQUENTIAL = {"use_parallel_residual": False, "hidden_dropout": 0.0, "attention_dropout": 0.0}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
BOTH = ["join", "add"]
FAMILIES = {  # sizes, calls in a layer
    "llama": (SIZES, BOTH),
    "qwen3": (SIZES, BOTH),
    "gemma": (SIZES, BOTH),
    "gemma2": (SIZES, BOTH),
    "granite": (SIZES | {"residual_multiplier": 0.5}, BOTH),
    "phi3": (SIZES | {"resid_pdrop": 0.25}, BOTH),
    "cohere": (SIZES, ["join"]),
    "gpt_neox": (HEADS | SEQUENTIAL, ["join"]),
    "qwen3_moe": (SIZES | MOE | {"moe_intermediate_size": 32}, BOTH),
    "mixtral": (SIZES | MOE, BOTH),
}


def make(family, **more):
    config = transformers.AutoConfig.for_model(family, **(FAMILIES[family][0] | more))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.bfloat16().train()


def pair(family="llama", device="cpu", **more):
    """A model with every fusion, and one without that of the residual stream."""
    fused = make(family, **more).to(device)
    plain = copy.deepcopy(fused)
    every = {"filter": lambda *_: True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fp8.convert(fused, **every), fp8.convert(plain, **every, fuse=OTHERS)


def tokens(model):
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3))
    return ids.to(model.device)


def step(model, **more):
    torch.manual_seed(5)
    model.zero_grad()
    found = model(input_ids=tokens(model), use_cache=False, **more)
    (100 * found.logits.float().square().mean()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    states = found.hidden_states or ()
    return {"logits": found.logits, **{f"state {i}": t for i, t in enumerate(states)}} | grads


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_same_bits(value.detach(), theirs[name].detach(), name)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_the_same_bits(monkeypatch, device, family):
    fused, plain = pair(family, device)
    calls, found = Calls(monkeypatch), []
    assert calls.during(lambda: found.append(step(fused))) == 2 * FAMILIES[family][1]
    assert calls.during(lambda: found.append(step(plain))) == []
    assert_same(*found)
    assert "2 residual fused" in fp8.summary(fused).splitlines()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(monkeypatch, reentrant):
    fused, plain = pair()
    calls, found = Calls(monkeypatch), []
    for model in (fused, plain):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found.append(step(model))
    assert_same(*found)
    assert calls.count("add") == 4  # of two layers, and of their recomputations


def test_hidden_states_and_attentions():
    fused, plain = pair()
    assert_same(step(fused, output_hidden_states=True), step(plain, output_hidden_states=True))
    ours, theirs = (
        m(input_ids=tokens(m), output_attentions=True).attentions for m in (fused, plain)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b, "attention")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(monkeypatch, cache):
    fused, plain = pair()
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    calls = Calls(monkeypatch)
    ours = fused.eval().generate(tokens(fused), **options)
    assert "add" in calls
    assert "join" not in calls
    assert torch.equal(ours, plain.eval().generate(tokens(plain), **options))


def test_compiled_model_has_one_graph():
    fused, plain = pair()
    torch._dynamo.reset()
    compiled = [torch.compile(m, backend="eager", fullgraph=True) for m in (fused, plain)]
    ours, theirs = (m(input_ids=tokens(fused), use_cache=False).logits for m in compiled)
    assert_same_bits(ours, theirs, "logits")


def test_hooks_on_a_layer():
    fused, _ = pair()
    layer, heard = fused.model.layers[0], []
    layer.register_forward_hook(lambda *_: heard.append("forward"))
    layer.register_full_backward_hook(lambda *_: heard.append("backward"))
    step(fused)
    assert heard == ["forward", "backward"]


def test_models_of_the_same_class_elsewhere_keep_theirs(monkeypatch):
    fused, _ = pair()
    other = make("llama")
    assert Calls(monkeypatch).during(step, other) == []
    assert not any(map(is_fused, other.modules()))
    kinds = [type(m) for m in other.modules()]
    fp8.revert(fused)
    assert [type(m) for m in fused.modules()] == kinds


@pytest.mark.gpu
def test_layers_launch_less():
    """Two sums and a sum of gradients less in each layer."""
    counts = []
    for model in pair(device="cuda"):
        step(model)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step(model)
        kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(len(kernels))
    assert counts[1] - counts[0] == 2 * 3


def test_lora(monkeypatch):
    """Adapters around the linears: the stream is theirs too."""
    peft = pytest.importorskip("peft")
    found = []
    for model in pair():
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        found.append(step(peft.get_peft_model(model, config)))
    assert any("lora" in name for name in found[0])
    assert_same(*found)
