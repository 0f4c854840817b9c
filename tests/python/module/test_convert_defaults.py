"""The caller's default dtype, device, grad mode and inference mode reach nothing that convert,
revert, summary and loading compute for themselves; and a conversion that fails changes nothing."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

import fp8

MODES = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]


def every(module, name):
    return True


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_scale_is_loaded_as_float32(default_dtype, device, mode):
    calibrated = fp8.Linear(16, 16, dtype=torch.float32)
    calibrated.input_scale = torch.tensor(0.25, dtype=torch.float32)
    fresh = fp8.convert(nn.Linear(16, 16, dtype=torch.float32), filter=every)
    with torch.device(device), mode():
        fresh.load_state_dict(calibrated.state_dict())
    assert fresh.input_scale.dtype == torch.float32
    assert fresh.input_scale.device.type == "cpu"
    assert not fresh.input_scale.is_inference()
    x = torch.ones(2, 16, dtype=torch.float32)
    assert torch.equal(fresh(x), calibrated(x))
    fresh(x).sum().backward()  # of a tensor that was made in inference mode: an error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_convert_and_revert_under_any_defaults(default_dtype, device, mode):
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.float32, device=device), nn.ReLU())
    with torch.device(device), mode():
        fp8.convert(model, filter=every)
        assert "tensorwise" in fp8.summary(model)
        x = torch.ones(2, 16, dtype=torch.float32)
        assert model(x).dtype == torch.float32
        assert type(fp8.revert(model)[0]) is nn.Linear


def test_a_revert_that_fails_changes_nothing():
    """Where warnings are errors, that about a layer that stays comes before any change."""
    model = fp8.convert(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), filter=every)
    model[0].input_scale = torch.ones((), dtype=torch.float32)
    model[1].forward = lambda x: x
    before = [(m.__class__, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"fp8.revert: 1 stays in FP8"):
            fp8.revert(model)
    assert [(m.__class__, dict(vars(m)), dict(m._buffers)) for m in model.modules()] == before
