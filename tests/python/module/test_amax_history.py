"""The buffer of delayed scaling: where it is, where it goes, and that no state_dict has it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fp8
from fp8.ops import make_history


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_buffers()]


def called(layer: fp8.Linear, calls: int = 3) -> fp8.Linear:
    for _ in range(calls):
        layer(torch.randn(4, 32)).sum().backward()
    return layer


def test_history_is_a_buffer_where_the_recipe_is_delayed():
    layer = fp8.Linear(32, 16, recipe="delayed")
    assert names(layer) == ["amax_history"]
    assert torch.equal(layer.amax_history, make_history())
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.recipe = "tensorwise"
    assert names(layer) == []
    assert not layer._non_persistent_buffers_set
    layer.recipe = "delayed:power_of_two"
    assert names(layer) == ["amax_history"]
    before = called(layer).amax_history
    layer.recipe = "delayed"
    assert layer.amax_history is before, "it goes on"
    assert before[:, 192].tolist() == [3, 1, 3]


def test_history_of_converted_models():
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32))
    model.requires_grad_(False)
    every = {"filter": lambda module, name: True}
    fp8.convert(model, "delayed", **every)
    assert names(model) == ["0.amax_history", "1.amax_history"]
    before = model[0].amax_history
    fp8.convert(model, "delayed", **every)
    assert model[0].amax_history is before
    fp8.convert(model, "rowwise", **every)
    assert names(model) == []
    fp8.convert(model, "delayed", **every)
    fp8.revert(model)
    assert names(model) == []
    assert not model[0]._non_persistent_buffers_set
    assert "recipe" not in vars(model[0])


def test_a_conversion_that_fails_leaves_no_history(monkeypatch):
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32))
    fit, calls = fp8.nn._histories.fit, []

    def fails_twice(layer):
        calls.append(layer)
        fit(layer)
        if len(calls) == 2:
            raise RuntimeError

    monkeypatch.setattr(fp8.nn._histories, "fit", fails_twice)
    with pytest.raises(RuntimeError):
        fp8.convert(model, "delayed", filter=lambda module, name: True)
    assert names(model) == []
    assert not model[0]._non_persistent_buffers_set
    assert type(model[0]) is nn.Linear


def test_history_from_linear():
    layer = called(fp8.Linear(32, 16, recipe="delayed"))
    twin = fp8.Linear.from_linear(layer, "delayed")
    assert twin.amax_history is layer.amax_history, "as every buffer"
    other = fp8.Linear.from_linear(layer, "rowwise")
    assert names(other) == []
    assert names(layer) == ["amax_history"]
    assert names(fp8.Linear.from_linear(nn.Linear(32, 16), "delayed")) == ["amax_history"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_history_survives_copies(how):
    layer = called(fp8.Linear(32, 16, recipe="delayed"))
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin.amax_history, layer.amax_history)
    assert twin.amax_history is not layer.amax_history
    assert list(twin.state_dict()) == ["weight", "bias"]
    x = torch.randn(4, 32)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.amax_history, layer.amax_history)


def test_a_pickle_from_before_the_buffer_gets_one():
    layer = fp8.Linear(32, 16, recipe="delayed")
    state = layer.__getstate__()
    state["_buffers"] = {}
    state["_non_persistent_buffers_set"] = set()
    old = fp8.Linear.__new__(fp8.Linear)
    old.__setstate__(copy.deepcopy(state))
    assert names(old) == ["amax_history"]
    del old._buffers["amax_history"]
    called(old)
    assert old.amax_history[:, 192].tolist() == [3, 1, 3], "made where it is missing"
    assert list(old.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_history_keeps_its_words_whatever_the_dtype(dtype):
    layer = called(fp8.Linear(32, 16, recipe="delayed"))
    before = layer.amax_history.clone()
    assert torch.equal(layer.to(dtype).amax_history, before)
    if dtype is not torch.float64:
        layer(torch.randn(4, 32, dtype=dtype))


def test_history_and_state_dicts():
    layer = called(fp8.Linear(32, 16, recipe="delayed"))
    before = layer.amax_history.clone()
    plain = nn.Linear(32, 16)
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.amax_history, before)


def test_history_of_a_meta_layer():
    layer = fp8.Linear(32, 16, device="meta", recipe="delayed")
    assert layer.amax_history.is_meta
    assert layer(torch.randn(4, 32, device="meta")).shape == (4, 16)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        layer.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(layer.amax_history, make_history()), "no history of what lay there"
    layer.reset_parameters()
    called(layer)
    with torch.device("meta"):
        assert fp8.Linear(32, 16, recipe="delayed").amax_history.is_meta


def test_history_in_inference_mode():
    """Made there, it is a normal tensor: training goes on with it."""
    layer = fp8.Linear(32, 16, recipe="tensorwise")
    with torch.inference_mode():
        layer.recipe = "delayed"
        layer(torch.randn(4, 32))
    called(layer)
    assert layer.amax_history[:, 192].tolist() == [4, 1, 3]


def test_history_with_functional_call_and_export():
    layer = fp8.Linear(32, 16, recipe="delayed")
    x = torch.randn(4, 32)
    other = {"amax_history": make_history()}
    y = torch.func.functional_call(layer, other, (x,))
    assert torch.equal(layer.amax_history, make_history())
    assert other["amax_history"][0, 192] == 1
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), y)
    assert exported.amax_history[0, 192] == 1
    again = torch.export.export(layer, (x,)).run_decompositions().module()
    assert torch.equal(again(x), y)


@pytest.mark.gpu
def test_history_moves_with_the_module():
    layer = called(fp8.Linear(32, 16, recipe="delayed"))
    before = layer.amax_history.clone()
    assert torch.equal(layer.cuda().amax_history.cpu(), before)
    assert layer.amax_history.is_cuda
