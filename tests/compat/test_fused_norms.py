"""Norms of transformers' families, fused by fp8.convert: found in all, which train as before."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny_transformers as tiny
import torch
from torch import nn

import fp8
from fp8.nn import _fused_norms

FAMILIES = {
    # norms in the model (None: not counted), what they compute
    "llama": "rms_norm, round_then_scale",
    "qwen3": "rms_norm, round_then_scale",
    "gemma": "rms_norm, scale_by_one_plus",
    "gemma2": "rms_norm, scale_by_one_plus",
    "gemma3_text": "rms_norm, scale_by_one_plus",
    "olmo2": "rms_norm, scale_then_round",
    "gpt_oss": "rms_norm, scale_then_round",
    "phi3": "rms_norm, round_then_scale",
    "mixtral": "rms_norm, round_then_scale",
    "t5": "rms_norm, round_then_scale",
    "gpt_neox": "layer_norm",
    "phi": "layer_norm",
    "gpt2": "layer_norm",
    "opt": "layer_norm",
    "bert": "layer_norm",
    "vit": "layer_norm",
    "whisper": "layer_norm",
}


def make(family, dtype):
    more = {} if family in tiny.FAMILIES else tiny.SIZES
    return tiny.make(family, dtype, **more)


def fuse(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fp8.convert(model, filter=lambda *_: False, fuse={"norms"})


def fused(model):
    return [m for m in model.modules() if _fused_norms.original(type(m)) is not None]


def step(model, family, dtype):
    loss = tiny.loss(family, dtype)(model)
    loss.backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_family_trains_as_before(family, dtype):
    model = make(family, dtype)
    plain = copy.deepcopy(model)
    fuse(model)
    norms = [m for m in plain.modules() if "norm" in type(m).__name__.lower()]
    assert len(fused(model)) == len(norms) > 0
    what = FAMILIES[family] if dtype is torch.bfloat16 else FAMILIES[family].split(",")[0]
    assert f"fused: {what}" in fp8.summary(model)  # in float32 the forms are one
    assert list(model.state_dict()) == list(plain.state_dict())
    (loss, grads), (expected, theirs) = step(model, family, dtype), step(plain, family, dtype)
    step_size = 2**-6 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(loss, expected, rtol=step_size, atol=step_size)
    assert grads.keys() == theirs.keys()
    largest = max(float(grad.norm()) for grad in theirs.values())
    for name, grad in grads.items():
        size = theirs[name].norm().clamp_min(0.01 * largest)  # some are zeros but for rounding
        error = float((grad - theirs[name]).norm() / size)
        # In bfloat16 an activation's last bit, two layers deep.
        assert error < (0.05 if dtype is torch.bfloat16 else 1e-3), name
    fp8.revert(model)
    assert not fused(model)
    again, _ = step(model, family, dtype)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant):
    model = fuse(make(family, torch.bfloat16))
    expected, theirs = step(model, family, torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss, grads = step(model, family, torch.bfloat16)
    assert torch.equal(loss, expected)
    assert all(torch.equal(grads[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generate_with_a_cache(family):
    model = make(family, torch.float32).eval()
    tokens = tiny.inputs(family)["input_ids"][:, :5]
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(fuse(model).generate(tokens, max_new_tokens=5, do_sample=False), expected)


def test_adapters_and_hooks_keep_working():
    peft = pytest.importorskip("peft")
    model = fuse(make("llama", torch.bfloat16))
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    loss, grads = step(adapted, "llama", torch.bfloat16)
    assert bool(loss.isfinite())
    assert grads
    assert all("lora" in name for name in grads)


def test_frozen_norms_have_no_gradient():
    model = fuse(make("llama", torch.bfloat16))
    for module in fused(model):
        module.requires_grad_(False)
    _, grads = step(model, "llama", torch.bfloat16)
    assert not any("norm" in name for name in grads)
    assert any("q_proj" in name for name in grads)


def test_a_norm_that_a_library_replaces_is_its_own():
    """As kernelize and Liger do: a forward on the instance."""
    model = make("llama", torch.float32)
    theirs = model.model.norm
    theirs.forward = lambda hidden_states: nn.functional.rms_norm(hidden_states, (32,)) * 3
    fuse(model)
    assert theirs not in fused(model)
    assert len(fused(model)) == 4
