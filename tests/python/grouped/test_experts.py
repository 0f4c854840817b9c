"""Transformers' mixtures of experts: registration, convert, revert, summary, and each family
against its own eager forward. Skipped where transformers is not installed."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch

import fp8

transformers = pytest.importorskip("transformers", reason="needs transformers (requirements.txt)")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Class, config and the way in which its experts run.
FAMILIES = {
    "Mixtral": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "DeepseekV3": {
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "Olmoe": {"intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
}


def make(family: str, device="cpu", dtype=torch.bfloat16, **changes):
    config_class = getattr(transformers, f"{family}Config")
    known = SIZES | FAMILIES[family]
    changes = {k: v for k, v in changes.items() if k in known or k == "hidden_act"}
    config = config_class(**(known | changes))
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:  # so that the experts' part of the output is not noise
                parameter.normal_(std=0.02 if "bias" in name else 0.12)
    model.set_experts_implementation("eager")
    return model.to(device=device, dtype=dtype).train()


def tokens(device):
    return torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)


def step(model, ids):
    """Logits, and the gradients of experts and embedding."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    wanted = {
        n: p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None and (".experts." in n or "embed_tokens" in n)
    }
    return out.logits.detach(), wanted


def close(actual, expected, limit):
    """rms of the difference over rms of the expected, both far from zero."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= limit, f"{float(error):.3f} > {limit}"


def experts_only(module, name):
    return name.endswith("experts")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_experts_of_each_family_against_eager(device, family, checkpointing):
    """One layer, so that both route alike. An experts layer's y has FP8 noise of 25 dB (5.6%),
    diluted by the residual stream; a gradient has passed through up to six quantizations of 4%
    noise, 9%."""
    model = make(family, device, num_hidden_layers=1, first_k_dense_replace=0)
    ids = tokens(device)
    logits, grads = step(model, ids)
    ours = copy.deepcopy(model)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    fp8.convert(ours, "rowwise", filter=experts_only)
    assert ours.config._experts_implementation == "fp8"
    found = [m for m in ours.modules() if hasattr(m, "is_concatenated")]
    assert all(fp8.experts.composed(m) is None for m in found)
    fp8_logits, fp8_grads = step(ours, ids)
    assert not torch.equal(fp8_logits, logits)  # it did run
    close(fp8_logits, logits, 0.10)
    assert grads.keys() == fp8_grads.keys()
    for name, grad in grads.items():
        close(fp8_grads[name], grad, 0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_generate(device, family):
    model = make(family, device).eval()
    fp8.convert(model, filter=experts_only)
    ids = tokens(device)[:, :8]
    with torch.no_grad(), fp8.cached_weights(model):
        made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert made.shape[0] == 2
    assert 8 < made.shape[1] <= 14


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_set_experts_implementation_works_by_itself(device, family):
    model = make(family, device)
    ids = tokens(device)
    fp8.convert(converted := copy.deepcopy(model), "rowwise", filter=experts_only)
    model.set_experts_implementation("fp8")
    assert torch.equal(step(model, ids)[0], step(converted, ids)[0])
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_experts_are_registered_whichever_is_imported_first():
    program = """
        {first}
        {second}
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        assert ALL_EXPERTS_FUNCTIONS["fp8"] is fp8.experts.experts_forward
    """
    for first, second in (
        ("import fp8", "import transformers"),
        ("import transformers.integrations.moe", "import fp8"),
        ("import transformers", "import fp8"),
    ):
        code = textwrap.dedent(program.format(first=first, second=second))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]


def test_importing_fp8_imports_no_transformers():
    code = "import sys, fp8; assert not any(m.startswith('transformers') for m in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_experts_revert_gives_back_what_was_there():
    model = make("Mixtral")
    ids = tokens("cpu")
    expected = step(model, ids)[0]
    for before in ("eager", "grouped_mm"):
        model.set_experts_implementation(before)
        fp8.convert(model, filter=experts_only)
        fp8.convert(model, "rowwise_gw_hp", filter=experts_only)  # again, with another recipe
        fp8.revert(model)
        assert model.config._experts_implementation == before
        assert not any("fp8" in key for m in model.modules() for key in vars(m))
    model.set_experts_implementation("eager")
    assert torch.equal(step(model, ids)[0], expected)


def test_experts_that_a_filter_leaves_out_run_as_before():
    model = make("Mixtral")
    ids = tokens("cpu")
    expected = step(model, ids)[0]
    fp8.convert(model, filter=lambda module, name: name == "model.layers.1.mlp.experts")
    rows = fp8.summary(model)
    assert "- (not converted)" in rows
    half = step(model, ids)[0]
    fp8.convert(model, filter=experts_only)
    whole = step(model, ids)[0]
    assert not torch.equal(half, expected)
    assert not torch.equal(half, whole)


def test_experts_in_the_summary():
    model = fp8.convert(make("Qwen3Moe"), filter=experts_only)
    text = fp8.summary(model)
    row = next(line for line in text.splitlines() if line.startswith("model.layers.0.mlp.experts"))
    assert row.split() == [
        "model.layers.0.mlp.experts", "8", "x", "64", "->", "32", "bfloat16", "rowwise", "(experts)"
    ]  # fmt: skip
    assert text.splitlines()[-1] == (
        "2 experts modules: 2 in FP8, 0 left alone; 100.0% of their weight elements in FP8"
    )
    model.model.layers[0].mlp.experts.double()
    assert "float64 weights; FP8 takes bfloat16, float16, float32" in fp8.summary(model)


class CustomGate:
    """A gate that the operator does not know: clamped, then SiLU."""

    def __call__(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=3.0)) * up.clamp(-3.0, 3.0)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_with_a_custom_gate_are_composed(device, family):
    model = make(family, device, num_hidden_layers=1)
    ids = tokens(device)
    experts = [m for m in model.modules() if hasattr(m, "is_concatenated")]
    for module in experts:
        module._apply_gate = CustomGate()
    expected = step(model, ids) if family == "GptOss" else None
    fp8.convert(model, filter=experts_only)
    assert "(experts, composed: a custom gate)" in fp8.summary(model)
    logits, grads = step(model, ids)
    assert logits.isfinite().all()
    if expected is not None:  # Mixtral's eager forward knows no gate but its own
        close(logits, expected[0], 0.10)
        for name, grad in expected[1].items():
            close(grads[name], grad, 0.15)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_composed_equals_fused(family, device):
    """The same quantizations around a gate outside: apart by the rounding of results between."""
    model = make(family, device)
    fp8.convert(model, filter=experts_only)
    experts = next(m for m in model.modules() if hasattr(m, "is_concatenated"))
    x = torch.randn(40, 64, device=device, dtype=torch.bfloat16)
    weights, index = torch.randn(40, 4, device=device).softmax(-1).topk(2)
    index[3] = 4  # a sentinel
    fused = experts(x, index, weights)
    vars(experts)["fp8_gate"] = None
    composed = experts(x, index, weights)
    close(composed, fused, 0.02)
    assert not fused[3].any()
    assert not composed[3].any()


def test_experts_gates_are_told_apart():
    known = {
        name: fp8.experts.gate_of(
            next(m for m in make(name).modules() if hasattr(m, "is_concatenated"))
        )
        for name in FAMILIES
    }
    assert known["Mixtral"] == ("silu", False, 1.702, 7.0)
    assert known["GptOss"] == ("clamped_silu", True, 1.702, 7.0)
    for name, activation in (("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", None)):
        module = next(
            m for m in make("Mixtral", hidden_act=name).modules() if hasattr(m, "is_concatenated")
        )
        gate = fp8.experts.gate_of(module)
        assert (gate.activation if gate else None) == activation


def test_experts_convert_together_with_linears():
    model = make("Mixtral")
    fp8.convert(model, "rowwise", filter=lambda module, name: "lm_head" not in name)
    kinds = {type(m).__name__ for _, m in model.named_modules() if hasattr(m, "recipe")}
    assert kinds == {"Linear"}
    assert type(model.lm_head) is torch.nn.Linear
    assert step(model, tokens("cpu"))[0].isfinite().all()
