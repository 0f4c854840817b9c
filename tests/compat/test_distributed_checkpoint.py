"""torch.distributed.checkpoint with converted models: scales arrive, or an error says why not."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from converted import convert, converted_layers, noticed, randomize
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

import fp8

ERRORS = (Exception, CheckpointException)  # the latter is a BaseException


def net() -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)))


def calibrated(recipe: str = "tensorwise") -> nn.Module:
    model = convert(net(), recipe)
    with torch.no_grad(), fp8.calibrate(model):
        model(data())
    return model


def data() -> Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(2))


def fresh() -> nn.Module:
    model = convert(net())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def assert_loaded(model: nn.Module, source: nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(model(0.5 * data()), source(0.5 * data()))
    for name, layer in converted_layers(source).items():
        assert torch.equal(converted_layers(model)[name].input_scale, layer.input_scale)


def load_or_refuse(load, model: nn.Module, source: nn.Module) -> None:
    """Loads. Then the model gives what the source gives, or there was an error about scales."""
    if noticed(lambda: quiet(load), "input_scale", ERRORS):
        assert_loaded(model, source)


def test_state_dict_into_a_fresh_model(tmp_path):
    """The plain recipe: the fresh model's own state_dict is filled in place."""
    source, model = calibrated(), fresh()
    quiet(dcp.save, {"model": source.state_dict()}, checkpoint_id=tmp_path)

    def load():
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
        model.load_state_dict(state["model"])

    load_or_refuse(load, model, source)


def test_state_dict_helpers(tmp_path):
    source, model = calibrated(), fresh()
    quiet(dcp.save, {"model": get_model_state_dict(source)}, checkpoint_id=tmp_path)

    def load():
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=tmp_path)
        set_model_state_dict(model, state["model"])

    load_or_refuse(load, model, source)


def test_whole_state_dict_set_on_a_fresh_model():
    source, model = calibrated(), fresh()
    state = get_model_state_dict(source, options=StateDictOptions(full_state_dict=True))
    load_or_refuse(lambda: set_model_state_dict(model, state), model, source)


def test_model_and_optimizer(tmp_path):
    """Training that resumes, the optimizer beside the model."""

    def trained(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        model(data()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    source, model = calibrated(), fresh()
    optimizers = [trained(source), trained(model)]
    state = dict(zip(("model", "optimizer"), get_state_dict(source, optimizers[0]), strict=True))
    quiet(dcp.save, state, checkpoint_id=tmp_path)

    def load():
        have = dict(zip(("model", "optimizer"), get_state_dict(model, optimizers[1]), strict=True))
        dcp.load(have, checkpoint_id=tmp_path)
        set_state_dict(
            model,
            optimizers[1],
            model_state_dict=have["model"],
            optim_state_dict=have["optimizer"],
        )

    load_or_refuse(load, model, source)


@pytest.mark.parametrize("recipe", tuple(fp8.RECIPES))
def test_converted_models_without_scales(recipe, tmp_path):
    """And from nn.Linear to FP8 and back: the keys are the same."""
    source, model, plain = convert(net(), recipe), convert(net(), recipe), net()
    for m in (model, plain):
        with torch.no_grad():
            for p in m.parameters():
                p.zero_()
    quiet(dcp.save, {"model": source.state_dict()}, checkpoint_id=tmp_path)
    for m in (model, plain):
        state = {"model": m.state_dict()}
        quiet(dcp.load, state, checkpoint_id=tmp_path)
        assert all(torch.equal(state["model"][n], t) for n, t in source.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(data()), source(data()))


def test_a_checkpoint_without_scales_into_a_calibrated_model(tmp_path):
    """The other way round: the model's own scales stay, or the missing keys are named."""
    source, model = convert(net()), calibrated()
    scales = {n: m.input_scale.clone() for n, m in converted_layers(model).items()}
    quiet(dcp.save, {"model": source.state_dict()}, checkpoint_id=tmp_path)
    state = {"model": model.state_dict()}
    if not noticed(partial(quiet, dcp.load, state, checkpoint_id=tmp_path), "input_scale", ERRORS):
        return
    model.load_state_dict(state["model"])
    for name, layer in converted_layers(model).items():
        assert layer.input_scale is None or torch.equal(layer.input_scale, scales[name])


def test_scales_by_torch_save_and_safetensors(tmp_path):
    from safetensors.torch import load_file, load_model, save_file, save_model

    source = calibrated()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    save_model(source, str(tmp_path / "whole.safetensors"))
    for how in ("torch", "safetensors", "load_model", "assign"):
        model = fresh()
        if how == "load_model":
            load_model(model, str(tmp_path / "whole.safetensors"))
        elif how == "safetensors":
            model.load_state_dict(load_file(tmp_path / "model.safetensors"))
        else:
            state = torch.load(tmp_path / "model.pt", weights_only=True)
            model.load_state_dict(state, assign=how == "assign")
        assert_loaded(model, source)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scales_that_were_cast_with_the_checkpoint(assign, dtype):
    """As scripts do that halve a file: a scale arrives in float32, whatever the file has."""
    source = calibrated()
    state = {n: t.to(dtype) for n, t in source.state_dict().items()}
    model = fresh() if dtype == torch.float64 else fresh().to(dtype)
    if assign and dtype == torch.float64:
        state |= {n: t.float() for n, t in state.items() if not n.endswith("input_scale")}
    model.load_state_dict(state, assign=assign)
    for name, layer in converted_layers(model).items():
        assert layer.input_scale.dtype == torch.float32
        expected = converted_layers(source)[name].input_scale
        assert torch.allclose(layer.input_scale, expected, rtol=2**-8)
    model(data().to(model[0].weight.dtype))


def test_deepcopy_keeps_scales():
    source = calibrated()
    assert_loaded(copy.deepcopy(source), source)
