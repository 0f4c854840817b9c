"""peft: adapters over converted layers, converted layers under adapters, and merging."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from converted import (
    assert_close,
    convert,
    converted_layers,
    every,
    fp8_output,
    noticed,
    randomize,
    relative,
    step,
)
from tiny_transformers import CAUSAL, inputs, loss, make
from torch import Tensor, nn

import fp8

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}


def _config(kind: str) -> peft.PeftConfig:
    if kind == "lora":
        return peft.LoraConfig(**LORA, task_type="CAUSAL_LM")
    if kind == "lora of all linears":
        return peft.LoraConfig(r=4, target_modules="all-linear")
    if kind == "rslora with bias":
        return peft.LoraConfig(**LORA, use_rslora=True, bias="lora_only")
    if kind == "dora":
        return peft.LoraConfig(**LORA, use_dora=True)
    if kind == "pissa":
        return peft.LoraConfig(**LORA, init_lora_weights="pissa_niter_4")
    if kind == "modules to save":
        return peft.LoraConfig(**LORA, modules_to_save=["lm_head", "o_proj"])
    if kind == "adalora":
        return peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS)
    if kind == "ia3":
        return peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])
    if kind == "loha":
        return peft.LoHaConfig(r=4, alpha=8, target_modules=TARGETS)
    if kind == "lokr":
        return peft.LoKrConfig(r=4, alpha=8, target_modules=TARGETS)
    if kind == "oft":
        return peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS)
    if kind == "boft":
        return peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj"])
    if kind == "vera":
        return peft.VeraConfig(r=4, target_modules=["q_proj"])
    if kind == "hra":
        return peft.HRAConfig(r=4, target_modules=TARGETS)
    if kind == "fourierft":
        return peft.FourierFTConfig(n_frequency=16, target_modules=["q_proj"])
    assert kind == "trainable tokens"
    return peft.LoraConfig(**LORA, trainable_token_indices=[3, 4])


KINDS = (
    "lora",
    "lora of all linears",
    "rslora with bias",
    "dora",
    "pissa",
    "modules to save",
    "adalora",
    "ia3",
    "loha",
    "lokr",
    "oft",
    "boft",
    "vera",
    "hra",
    "fourierft",
    "trainable tokens",
)


def adapters_that_count(model: nn.Module) -> nn.Module:
    """Adapters begin as zeros, mostly: other values, the same ones each time."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and p.dim() > 1 and "original" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return model


def adapted(kind: str, order: str | None) -> nn.Module:
    """A llama with adapters. order: of conversion and adapters; None: no conversion."""
    torch.manual_seed(1)
    model = make("llama")
    if order == "convert first":
        convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, _config(kind))
    if order == "adapters first":
        convert(model)
    return adapters_that_count(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["convert first", "adapters first"])
def test_adapters_train_as_over_linear(kind, order):
    exact = step(adapted(kind, None), loss("llama"))
    model = adapted(kind, order)
    converted_layers(model)
    ours = step(model, loss("llama"))
    known = {w for w in ours.warned if "never called" in w}  # hra and oft read the weight
    assert_close(ours._replace(warned=ours.warned - known), exact, close=0.35)
    assert list(model.state_dict()) == list(adapted(kind, None).state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["convert first", "adapters first"])
def test_no_layer_is_reported_that_an_adapter_goes_around(kind, order):
    model = adapted(kind, order)
    called = set()
    layers = converted_layers(model)
    for layer in layers.values():
        layer.register_forward_hook(lambda m, *_: called.add(m))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**inputs("llama")).loss.backward()
        text = fp8.summary(model).splitlines()
    for name, layer in layers.items():
        line = next(x for x in text if x.split()[0] == name)
        assert ("never called" in line) == (layer not in called), line


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload(kind):
    """Back to a converted model with other weights: what merging nn.Linear layers gives."""
    plain, model = adapted(kind, None), adapted(kind, "convert first")
    before = set(converted_layers(make_converted()))
    if not hasattr(plain, "merge_and_unload"):
        pytest.skip("cannot merge")
    plain, model = plain.merge_and_unload(), model.merge_and_unload()
    after = {n for n, m in model.named_modules() if isinstance(m, fp8.Linear)}
    assert after == before
    for name, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name
    given = inputs("llama")
    with torch.no_grad():
        expected = convert(fp8.revert(copy.deepcopy(plain)))(**given).logits
        assert relative(model(**given).logits, expected) < 1e-3


def make_converted() -> nn.Module:
    return convert(make("llama"))


@pytest.mark.parametrize("order", ["convert first", "adapters first"])
def test_adapters_save_and_load(order, tmp_path):
    model = adapted("lora", order).eval()
    model.save_pretrained(tmp_path)
    base = make("llama").eval()
    if order == "convert first":
        convert(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    if order == "adapters first":
        convert(loaded)
    given = inputs("llama")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**given).logits, model(**given).logits)
    plain = peft.PeftModel.from_pretrained(make("llama").eval(), tmp_path)
    with torch.no_grad():
        assert relative(model(**given).logits, plain.eval()(**given).logits) < 0.25


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model = adapted("modules to save", "convert first")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model(**inputs("llama")).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_converted(), tmp_path)
    given = inputs("llama")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**given).logits, model.eval()(**given).logits)


def _net() -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "loha"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
def test_merge_and_unmerge_inside_cached_weights(kind, recipe):
    """peft writes base_layer.weight.data: no version counter moves."""
    configs = {
        "lora": peft.LoraConfig(r=4, target_modules=["0"]),
        "dora": peft.LoraConfig(r=4, target_modules=["0"], use_dora=True),
        "ia3": peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
        "loha": peft.LoHaConfig(r=4, target_modules=["0"]),
    }
    model = peft.get_peft_model(convert(_net(), recipe), configs[kind])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    base = model.base_model.model[0].base_layer
    assert isinstance(base, fp8.Linear)
    x = torch.randn(8, 64)
    kind_of_scale = "tensorwise" if recipe == "delayed" else recipe
    with torch.no_grad(), fp8.cached_weights(model):
        for change in (model.merge_adapter, model.unmerge_adapter, model.merge_adapter):
            model(x)
            base(x)
            if not noticed(change):
                return
            assert relative(base(x), fp8_output(base, x, kind_of_scale)) < 1e-3


def test_several_adapters_and_a_disabled_one():
    model = adapted("lora", "convert first").eval()
    given = inputs("llama")
    with torch.no_grad():
        first = model(**given).logits
        model.add_adapter("other", _config("lora"))
        model.set_adapter("other")
        second = model(**given).logits
        model.set_adapter("default")
        assert torch.equal(model(**given).logits, first)
        with model.disable_adapter():
            base = model(**given).logits
        assert torch.equal(base, make_converted().eval()(**given).logits)
    assert relative(second, base) < 1e-6  # a new adapter is zero
    assert relative(first, base) > 0.01


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_under_checkpointing(use_reentrant):
    results = []
    for checkpointing in (False, True):
        model = adapted("lora", "convert first")
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        results.append(step(model, loss("llama")))
    assert results[0].grads.keys() == results[1].grads.keys()
    assert all(torch.equal(g, results[1].grads[n]) for n, g in results[0].grads.items())


def test_adapters_on_experts():
    """Parameters, not modules: target_parameters wraps them in a parametrization."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters)
    results = []
    for order in (None, "convert first", "adapters first"):
        torch.manual_seed(1)
        model = make("mixtral")
        if order == "convert first":
            convert(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config)
        if order == "adapters first":
            convert(model)
        results.append(step(adapters_that_count(model), loss("mixtral")))
    for ours in results[1:]:
        assert_close(ours, results[0], close=0.45)


def test_prompt_tuning():
    results = []
    for in_fp8 in (False, True):
        torch.manual_seed(1)
        model = make("llama")
        if in_fp8:
            convert(model)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        results.append(step(peft.get_peft_model(model, config), loss("llama")))
    assert_close(results[1], results[0], close=0.35)


def test_conv1d_of_gpt2_with_adapters():
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    results = []
    for order in (None, "convert first", "adapters first"):
        torch.manual_seed(1)
        model = make("gpt2")
        if order == "convert first":
            convert(model)
        model = peft.get_peft_model(model, config)
        if order == "adapters first":
            convert(model)
        results.append(step(adapters_that_count(model), loss("gpt2")))
    for ours in results[1:]:
        assert_close(ours, results[0])


def test_filter_by_name_of_an_adapter():
    """The adapter's own small matrices are nn.Linear too: the default rules leave them alone."""
    model = peft.get_peft_model(make("llama"), _config("lora"))
    fp8.convert(model, filter=lambda m, n: "lora_" not in n and every(m, n))
    assert not any("lora_" in name for name in converted_layers(model))
    assert CAUSAL["llama"]["num_hidden_layers"] * 3 <= len(converted_layers(model))
    given: dict[str, Tensor] = inputs("llama")
    model(**given).loss.backward()
