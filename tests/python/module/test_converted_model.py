"""A converted model behaves as before: training, hooks, ties, copies, pickles."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fp8


def every(module, name):
    """A filter that converts whatever the safety rules allow (by default, large shapes only)."""
    return True


def kinds(model):
    return {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_convert_keeps_tied_parameters_tied(model, tokens):
    model.lm_head.weight = model.embed.weight
    fp8.convert(model, filter=every)
    assert model.lm_head.weight is model.embed.weight
    with torch.no_grad():
        model.embed.weight.zero_()
    assert torch.count_nonzero(model(tokens)) == 0
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.embed.weight


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_convert_keeps_an_optimizer_working(model, tokens, make):
    torch.manual_seed(0)
    optimizer = make(model.parameters(), lr=0.01)
    targets = tokens.flatten()

    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    fp8.convert(model, filter=every)
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses = [step() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_convert_keeps_hooks_and_their_handles():
    linear = nn.Linear(16, 16)
    calls = []
    linear.register_forward_pre_hook(lambda *_: calls.append("pre"))
    handle = linear.register_forward_hook(lambda *_: calls.append("post"))
    linear.register_full_backward_hook(lambda *_: calls.append("backward"))
    linear.register_state_dict_post_hook(lambda *_: calls.append("state"))
    linear.weight.register_hook(lambda grad: calls.append("weight"))
    fp8.convert(linear, filter=every)
    linear(torch.randn(2, 16, requires_grad=True)).sum().backward()
    linear.state_dict()
    assert sorted(calls) == ["backward", "post", "pre", "state", "weight"]
    handle.remove()
    calls.clear()
    linear(torch.randn(2, 16))
    assert calls == ["pre"]


def test_convert_keeps_training_flag_device_and_requires_grad(model, tokens):
    model.eval()
    model.blocks[0].up.weight.requires_grad_(False)
    fp8.convert(model, filter=every)
    assert not model.blocks[0].up.training
    assert not model.blocks[0].up.weight.requires_grad
    model(tokens).sum().backward()
    assert model.blocks[0].up.weight.grad is None
    assert model.blocks[0].up.bias.grad is not None


def test_convert_works_after_module_compile():
    linear = nn.Linear(64, 48)
    x = torch.randn(3, 64)
    linear.compile(backend="eager")
    linear(x)
    fp8.convert(linear, filter=every)
    assert torch.equal(linear(x), fp8.ops.fused_linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_model_survives_copies(model, tokens, clone):
    fp8.convert(model, "rowwise", filter=every)
    twin = clone(model)
    assert torch.equal(twin(tokens), model(tokens))
    assert fp8.summary(twin) == fp8.summary(model)
    assert set(kinds(fp8.revert(twin)).values()) == {nn.Linear}
    assert set(kinds(model).values()) == {fp8.Linear}


def test_converted_model_saves_and_loads(model, tokens):
    fp8.convert(model, "rowwise", filter=every)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(tokens), model(tokens))


def test_converted_model_works_with_functional_call(model, tokens):
    fp8.convert(model, filter=every)
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    assert torch.count_nonzero(torch.func.functional_call(model, zeros, tokens)) == 0
    assert torch.count_nonzero(model(tokens)) > 0
