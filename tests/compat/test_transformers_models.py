"""Sixteen families of transformers: a converted model trains as the model does."""

from __future__ import annotations

import copy

import pytest
import torch
from converted import (
    CLOSE,
    assert_close,
    assert_same,
    assert_same_keys,
    assert_trains_alike,
    convert,
    converted_layers,
    every,
    relative,
    step,
)
from tiny_transformers import CAUSAL, FAMILIES, MIXTURES, inputs, loss, make
from torch import nn

import fp8

ROUTED = 0.45
"""For `close` where top-k choices nearly tie: other experts get some of the tokens."""


def settled(step_result):
    """Without the warnings about layers that were never called: those are tested elsewhere."""
    known = {w for w in step_result.warned if "never called" in w}
    return step_result._replace(warned=step_result.warned - known)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_model_trains_as_with_linear(family, recipe):
    model = make(family)
    copied = convert(copy.deepcopy(model), recipe)
    converted_layers(copied)
    assert_same_keys(copied, model)
    ours, theirs = (settled(step(m, loss(family))) for m in (copied, model))
    assert_close(ours, theirs, close=ROUTED if family in MIXTURES else CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_in_bfloat16_trains_as_with_linear(family):
    model = make(family, torch.bfloat16)
    copied = convert(copy.deepcopy(model), "delayed")
    run = loss(family, torch.bfloat16)
    ours, theirs = (settled(step(m, run)) for m in (copied, model))
    assert_close(ours, theirs, close=ROUTED if family in MIXTURES else CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_summary_names_every_layer_that_multiplies_by_a_matrix(family):
    """Conv1D, which GPT-2 is made of, is no nn.Linear: it is converted, or listed with a reason."""
    model = convert(make(family))
    text = fp8.summary(model)
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            assert name in text, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_that_is_called_is_converted(family):
    """Code that asks a weight for its dtype, or its device, does not read past the forward."""
    model = convert(make(family))
    called = set()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for module in linears.values():
        module.register_forward_hook(lambda m, *_: called.add(m))
    model(**inputs(family))
    for name, module in linears.items():
        assert isinstance(module, fp8.Linear) or module not in called, name


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "t5", "bert", "vit"])
def test_gradient_checkpointing_changes_no_bit(family, recipe, use_reentrant):
    """20 steps: past the window of `delayed`, with weights that outgrow it. One step of T5, which
    adds the gradients of shared tensors in another order when it recomputes."""
    models = [convert(make(family), recipe) for _ in range(2)]
    models[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        for model in models:
            if family != "vit":
                model.enable_input_require_grads()
    given = inputs(family)
    steps = 20 if recipe == "delayed" and family != "t5" else 1
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in models]
    for index in range(steps):
        if index == 17:
            with torch.no_grad():
                for model in models:
                    next(iter(converted_layers(model).values())).weight.mul_(3)
        results = [step(m, lambda m: m(**given).loss) for m in models]
        assert_same(*results, 1e-5 if family == "t5" else 0.0)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("family", CAUSAL)
def test_generate_with_a_cache(family):
    """With the cache a token at a time, without it the whole text each time: with one scale per row
    the same rows are the same codes; and inside cached_weights nothing changes."""
    model = convert(make(family).eval(), "rowwise")
    prompt = inputs(family)["input_ids"][:, :6]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(prompt, **settings)
    plain = model.generate(prompt, use_cache=False, **settings)
    for ours, theirs in zip(cached.logits[:2], plain.logits[:2], strict=True):
        assert relative(ours, theirs) < 0.1
    with fp8.cached_weights(model):
        again = model.generate(prompt, **settings)
    assert torch.equal(again.sequences, cached.sequences)
    assert all(map(torch.equal, again.logits, cached.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_and_from_pretrained(family, tmp_path):
    model = make(family).eval()
    copied = convert(copy.deepcopy(model))
    copied.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any(isinstance(m, fp8.Linear) for m in loaded.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert "fp8" not in (tmp_path / "config.json").read_text()


def test_from_pretrained_of_a_calibrated_model(tmp_path):
    """The scales are extra keys: they arrive in a converted model by load_state_dict, and
    from_pretrained, which knows nn.Linear only, says that they are unexpected."""
    model = convert(make("llama").eval())
    given = inputs("llama")
    with torch.no_grad(), fp8.calibrate(model):
        model(**given)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    scales = {n for n in model.state_dict() if n.endswith("input_scale")}
    assert scales
    assert set(info["unexpected_keys"]) == scales
    convert(loaded.eval())
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(**given).logits, model(**given).logits)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_tied_embeddings_and_resized_ones(family):
    """A head that shares the embedding's weight, converted too; new tokens after the conversion."""
    model = make(family, tie_word_embeddings=True)
    model.tie_weights()
    copied = convert(copy.deepcopy(model))
    assert copied.lm_head.weight is copied.get_input_embeddings().weight
    for m in (model, copied):
        torch.manual_seed(1)
        m.resize_token_embeddings(112, mean_resizing=False)
    assert copied.lm_head.weight is copied.get_input_embeddings().weight
    ours, theirs = (settled(step(m, loss(family))) for m in (copied, model))
    assert_close(ours, theirs, close=ROUTED if family in MIXTURES else CLOSE)
    assert_same_keys(copied, model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention):
    assert_trains_alike(make("llama", attn_implementation=attention), loss("llama"))


def test_filters_see_names_of_transformers():
    model = make("qwen3_moe")
    seen = []
    fp8.convert(model, filter=lambda m, n: seen.append(n) or every(m, n))
    assert "model.layers.0.self_attn.q_proj" in seen
    assert "model.layers.1.mlp.experts" in seen
