"""Whole Hugging Face models with experts in FP8: every call of an experts module is compared with
the eager loop on what it got, since routing may change where scores nearly tie."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from tiny_models import (
    FAMILIES,
    eager,
    experts_of,
    make,
    only_experts,
    record_calls,
    relative,
    tokens,
)

import fp8

FORWARD, LEAST = 0.105, 0.019  # derived in test_experts_values.py
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def check_calls(calls, layers):
    assert len(calls) >= layers
    for module, args, output in calls:
        with torch.no_grad():
            assert LEAST < relative(output, eager(module, *args)) < FORWARD


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_trains(family, device, checkpointing):
    model = make(family, device).train()
    experts = experts_of(model)
    fp8.convert(model, filter=only_experts)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(device=device)
    calls = record_calls(model, lambda: model(input_ids=ids, labels=ids).loss.backward())
    check_calls(calls, len(experts))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    for module in experts.values():
        assert all(float(p.grad.abs().max()) > 0 for p in module.parameters())


def test_checkpointing_changes_no_gradient(family):
    grads = []
    for checkpointing in (False, True):
        model = fp8.convert(make(family).train(), filter=only_experts)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("device", DEVICES)
def test_model_generates(family, device):
    model = fp8.convert(make(family, device).eval(), filter=only_experts)
    prompt = tokens(2, 8, device)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), fp8.cached_weights(model):
        made = []
        calls = record_calls(model, lambda: made.append(model.generate(prompt, **settings)))
    assert made[0].shape == (2, 14)
    check_calls(calls, 6 * len(experts_of(model)))
    with torch.no_grad():
        assert torch.equal(model.generate(prompt, **settings), made[0])


def test_model_under_autocast():
    model = fp8.convert(make("mixtral"), filter=only_experts)
    with torch.autocast("cpu", torch.bfloat16):
        calls = record_calls(model, lambda: model(tokens()).logits.float().sum().backward())
    for module, args, output in calls:
        with torch.no_grad():
            expected = eager(module, *(a.float() if a.is_floating_point() else a for a in args))
            assert LEAST < relative(output, expected) < FORWARD
    grad = next(iter(experts_of(model).values())).gate_up_proj.grad
    assert grad.dtype == torch.float32


def test_model_takes_hidden_states_of_another_dtype():
    """A norm that computes in fp32 before experts in bf16: what transformers' grouped_mm takes."""
    model = fp8.convert(make("qwen3_moe", dtype=torch.bfloat16), filter=only_experts)
    module = next(iter(experts_of(model).values()))
    index = torch.arange(16).view(8, 2) % 8
    y = module(torch.randn(8, 64), index, torch.full((8, 2), 0.5))
    assert y.dtype == torch.float32


def test_model_in_inference_mode(family):
    model = fp8.convert(make(family).eval(), filter=only_experts)
    with torch.no_grad():
        expected = model(tokens()).logits
    with torch.inference_mode():
        assert torch.equal(model(tokens()).logits, expected)


def test_model_copies_and_pickles(family):
    model = fp8.convert(make(family), filter=only_experts, experts_recipe="rowwise_gw_hp")
    with torch.no_grad():
        expected = model(tokens()).logits
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        with torch.no_grad():
            assert torch.equal(other(tokens()).logits, expected)
        assert "rowwise_gw_hp" in fp8.summary(other)
        fp8.revert(other)
        assert all(module.config is other.config for module in experts_of(other).values())
    assert "rowwise_gw_hp" in fp8.summary(model)


def test_model_saves_nothing_of_fp8(family, tmp_path):
    """state_dict and config.json are those of the model before, and load into it again."""
    model = make(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fp8.convert(model, filter=only_experts)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.save_pretrained(tmp_path)
    assert "fp8" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in before.items())
    assert not any(map(fp8.integrations.transformers.in_fp8, loaded.modules()))


def test_model_from_pretrained_with_the_implementation(family, tmp_path):
    fp8.integrations.transformers.register()
    make(family).save_pretrained(tmp_path)
    kind = type(make(family))
    model = kind.from_pretrained(tmp_path, experts_implementation="fp8")
    modules = experts_of(model)
    assert all(map(fp8.integrations.transformers.in_fp8, modules.values()))
    check_calls(record_calls(model, lambda: model(tokens())), len(modules))


def test_model_compiles():
    """No graph break in the experts; eager's values up to what a code more or less makes."""
    model = fp8.convert(make("mixtral"), filter=only_experts)
    module = next(iter(experts_of(model).values()))
    hidden, index = torch.randn(24, 64), torch.arange(48).view(24, 2) % 4
    weights = torch.rand(24, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = compiled(hidden.requires_grad_(), index, weights)
    (dx,) = torch.autograd.grad(y.sum(), hidden)
    expected = module(hidden, index, weights)
    (expected_dx,) = torch.autograd.grad(expected.sum(), hidden)
    assert relative(y, expected) < 1e-3
    assert relative(dx, expected_dx) < 1e-3
